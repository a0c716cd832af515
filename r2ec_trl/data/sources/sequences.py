"""Ready sequences: JSON lines of user, history and target a split, and the items with any text columns."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

import polars as pl
from datasets import DatasetDict

from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.schema import ITEMS, SPLITS
from r2ec_trl.data.sources.jsonl import ROW, Schema, read_jsonl, read_objects, reject
from r2ec_trl.data.sources.source import TOO_LATE, Kind, checked_ids, checked_items
from r2ec_trl.data.text import clean_text
from r2ec_trl.errors import UserError

logger = logging.getLogger(__name__)

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
    items = read_objects(paths[ITEMS], {"item_id": "item_id", "title": "title"}, skipped)
    items = items.with_columns(title=pl.when(clean_text(items["title"]).is_not_null()).then("title"))
    items = checked_items(items, paths[ITEMS], skipped, strict=True)
    splits = {split: _read_rows(paths[split], items["item_id"], skipped) for split in SPLITS}
    for column in _TYPES:
        lacking = [split for split in SPLITS if column not in splits[split].columns]
        if 0 < len(lacking) < len(SPLITS):
            logger.warning("'%s': no %s in %s, so that prompts differ.", folder, column, " and ".join(lacking))
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
    rows = checked_ids(pl.concat(frames), ("user_id", "target"), path, skipped)
    rows = rows.with_columns(pl.col("history").list.eval(pl.element().str.strip_chars()))
    rows = reject(rows, pl.col("history").list.len() == 0, "has an empty history", path, skipped)
    known = pl.lit(catalogue).implode()
    strange = rows.select(ROW, "history").explode("history").filter(~pl.col("history").is_in(known).fill_null(False))
    unknown = pl.col(ROW).is_in(strange[ROW].unique().implode())
    rows = reject(rows, ~pl.col("target").is_in(known), "has a target outside the catalogue", path, skipped, "target")
    rows = reject(rows, unknown, "has a history item outside the catalogue", path, skipped, "history")
    for column, kind in _TYPES.items():
        if rows[column].null_count() == rows.height:
            rows = rows.drop(column)
        else:
            rows = _typed(rows, column, kind, path, skipped)
    if rows.is_empty():
        raise UserError(f"{path}: no row is left after the bad ones, and each split needs at least one.")
    return rows.drop(ROW)


def _typed(
    rows: pl.DataFrame, column: str, kind: pl.DataType, path: Path, skipped: Counter[str] | None
) -> pl.DataFrame:
    """A column of numbers: finite ratings, as many as the history; times in whole seconds of our days."""
    value, is_list = pl.col(column).cast(kind, strict=False), isinstance(kind, pl.List)
    element = pl.element() if is_list else value
    wrong, far = element.is_null(), pl.lit(False)
    if kind == pl.List(pl.Float64):
        wrong |= ~element.is_finite()
    else:
        far = ~element.is_between(0, TOO_LATE)
    if is_list:
        wrong, far = (value.list.eval(test).list.any() for test in (wrong, far & pl.element().is_not_null()))
        wrong |= value.list.len() != pl.col("history").list.len()
    rows = reject(rows, value.is_null() | wrong, f"has a {column} that does not fit", path, skipped, column)
    seconds = f"has a {column} that is no time in whole seconds (milliseconds? divide by 1000)"
    return reject(rows, far, seconds, path, skipped, column).with_columns(value)


KIND = Kind(import_sequences, "input=folder skip_bad_rows", ready=True)
