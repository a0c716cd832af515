"""Ready sequences: JSON lines of user, history and target a split, and the items with any text columns."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import polars as pl
from datasets import DatasetDict

from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.schema import ITEMS, SPLITS
from r2ec_trl.data.sources.jsonl import ROW, UNREADABLE, Schema, as_text, blocks, parse_object, read_jsonl, reject
from r2ec_trl.errors import UserError

_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",), ITEMS: (ITEMS,)}
_SCHEMA: Schema = {
    "user_id": pl.String,
    "history": pl.List(pl.String),
    "target": pl.String,
    "history_ratings": pl.List(pl.String),
    "history_timestamps": pl.List(pl.String),
    "timestamp": pl.String,
}
_TYPES: dict[str, pl.DataType] = {
    "history_ratings": pl.List(pl.Float64),
    "history_timestamps": pl.List(pl.Int64),
    "timestamp": pl.Int64(),
}


def import_sequences(
    folder: str | os.PathLike[str], *, skip_bad_rows: bool = False, dropped: Counter[str] | None = None
) -> DatasetDict:
    """
    Read `train`, `valid` (or `validation`) and `test` `.jsonl` rows with `user_id`, `history` (oldest first) and
    `target`, and `items.jsonl` with `item_id`, `title` and any text columns; each may be gzipped (`.jsonl.gz`).

    Rows may also hold `history_ratings`, `history_timestamps` and `timestamp` (whole seconds). Ids that are numbers
    become text; lists and numbers among the item columns do too.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the four files.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out and count them, instead of raising at the first.
        dropped (`Counter`, *optional*):
            Filled with cause and number of what was left out.

    Returns:
        [`~datasets.DatasetDict`]: the four splits, not yet validated.
    """
    dropped = Counter() if dropped is None else dropped
    skipped = dropped if skip_bad_rows else None
    paths = {split: _find(Path(folder), names) for split, names in _NAMES.items()}
    items = _checked_items(read_items(paths[ITEMS], skipped), paths[ITEMS], skipped)
    splits = {split: _read_rows(paths[split], items["item_id"], skipped) for split in SPLITS}
    splits[ITEMS] = items
    return DatasetDict({split: to_dataset(frame) for split, frame in splits.items()})


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        for ending in (".jsonl", ".jsonl.gz"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    raise UserError(f"'{folder}' has no file {names[0]}.jsonl: ready sequences are train, valid, test and items.")


def _read_rows(path: Path, catalogue: pl.Series, skipped: Counter[str] | None) -> pl.DataFrame:
    frames = list(read_jsonl(path, _SCHEMA, skip_bad_rows=skipped is not None, dropped=skipped))
    if not frames:
        raise UserError(f"{path} is empty: each split needs at least one row.")
    rows = pl.concat(frames)
    for column in ("user_id", "target"):
        rows = reject(rows, pl.col(column).is_null() | (pl.col(column) == ""), f"has no {column}", path, skipped)
    rows = reject(rows, pl.col("history").list.len() == 0, "has an empty history", path, skipped)
    known = pl.lit(catalogue).implode()
    strange = rows.select(ROW, "history").explode("history").filter(~pl.col("history").is_in(known).fill_null(False))
    unknown = pl.col(ROW).is_in(strange[ROW].unique().implode())
    rows = reject(rows, ~pl.col("target").is_in(known), "has a target outside the catalogue", path, skipped, "target")
    rows = reject(rows, unknown, "has a history item outside the catalogue", path, skipped, "history")
    for column, kind in _TYPES.items():
        if rows[column].null_count() == rows.height:
            rows = rows.drop(column)
            continue
        cast = pl.col(column).cast(kind, strict=False)
        bad = cast.is_null()
        if isinstance(kind, pl.List):
            bad |= (cast.list.len() != pl.col("history").list.len()) | cast.list.eval(
                pl.element().is_null()
            ).list.any()
        rows = reject(rows, bad, f"has a {column} that does not fit", path, skipped, column)
        rows = rows.with_columns(cast)
    if rows.is_empty():
        raise UserError(f"{path}: no row is left after the bad ones, and each split needs at least one.")
    return rows.drop(ROW)


def read_items(
    path: Path, skipped: Counter[str] | None, item_column: str = "item_id", title_column: str = "title"
) -> pl.DataFrame:
    """
    The catalogue from JSON lines, with every column that any line has: read line by line, as no key may be lost.

    Args:
        path (`Path`):
            The file.
        skipped (`Counter`, *optional*):
            Where lines that are no JSON objects are counted; None to raise at the first.
        item_column, title_column (`str`, *optional*):
            Keys that become `item_id` and `title`.

    Returns:
        `polars.DataFrame`: text columns, and the line number in [`ROW`](~r2ec_trl.data.sources.jsonl.ROW).
    """
    names = {item_column: "item_id", title_column: "title"}
    rows: list[dict[str, str | int | None]] = []
    columns: dict[str, None] = {"item_id": None, "title": None}
    for first, block in blocks(path):
        for number, line in enumerate(block.split(b"\n"), start=first):
            if not line.strip():
                continue
            try:
                found = parse_object(line).items()
                row = {names.get(key, key): _flat_text(value) for key, value in found}
            except ValueError as error:
                if skipped is None:
                    raise UserError(
                        f"{path}, row {number}: {error}; mend the line or pass --skip_bad_rows."
                    ) from error
                skipped[UNREADABLE] += 1
                continue
            columns.update(dict.fromkeys(row))
            rows.append({**row, ROW: number})
    if not rows:
        raise UserError(f"{path} is empty: a catalogue needs at least one item.")
    frame = pl.DataFrame(rows, schema={**dict.fromkeys(columns, pl.String), ROW: pl.Int64})
    return frame


def _checked_items(items: pl.DataFrame, path: Path, skipped: Counter[str] | None) -> pl.DataFrame:
    for column in ("item_id", "title"):
        bad = pl.col(column).is_null() | (pl.col(column) == "")
        items = reject(items, bad, f"has no {column}", path, skipped)
    repeated = pl.struct("item_id").is_first_distinct().not_()
    return reject(items, repeated, "repeats an item_id", path, skipped, "item_id").drop(ROW)


def _flat_text(value: object) -> str | None:
    if isinstance(value, list):
        return " ".join(text for part in value if (text := _flat_text(part)))
    return as_text(value)
