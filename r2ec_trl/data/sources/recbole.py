"""RecBole's atomic files: tab-separated `.inter` and `.item` whose header says `name:type`."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import polars as pl

from r2ec_trl.data.sources.delimited import Dialect, check_unique, column_names, no_column, read_table
from r2ec_trl.data.sources.jsonl import listing
from r2ec_trl.data.sources.source import (
    SPLIT_CODES,
    UNIT_FLAG,
    UNITS,
    Kind,
    Source,
    check_interactions,
    check_same_ids,
)
from r2ec_trl.data.sources.table import import_items
from r2ec_trl.errors import UserError

_DIALECT = Dialect(separator="\t", quoted=False)
_TITLES = ("title", "movie_title", "name", "item_name", "track_name", "book_title", "artist_name")
_PARTS = {"train": "train", "validation": "valid", "test": "test"}


def import_recbole(
    folder: str | os.PathLike[str],
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    rating_column: str | None = "rating",
    time_column: str = "timestamp",
    title_column: str | None = None,
    timestamp_unit: str = "s",
    skip_bad_rows: bool = False,
) -> Source:
    """
    Read a folder of atomic files: `NAME.inter` (or the benchmark's `NAME.train.inter`, `.valid.`, `.test.`) and
    `NAME.item`.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of exactly one dataset.
        user_column, item_column, rating_column, time_column (`str`):
            Field names without their types; a file without `rating` has no ratings.
        title_column (`str`, *optional*):
            By default the first of title, movie_title, name, … that there is.
        timestamp_unit (`str`, *optional*, defaults to `"s"`):
            `"s"`, `"ms"`, `"us"` or `"ns"`.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out and count them.
    """
    dropped: Counter[str] = Counter()
    skipped = dropped if skip_bad_rows else None
    name, parts = _find(Path(folder))
    wanted = {"user_id": user_column, "item_id": item_column, "timestamp": time_column}
    if rating_column:
        wanted["rating"] = rating_column
    interactions = []
    for split, path in parts.items():
        types = _typed_names(path)
        columns = {key: types.get(column, column) for key, column in wanted.items()}
        optional = ["rating"] if rating_column == "rating" else []
        frames = read_table(path, columns, dialect=_DIALECT, optional=optional, skipped=skipped)
        frame = check_interactions(frames, path, skipped=skipped, unit=timestamp_unit, flag=UNIT_FLAG)
        if split:
            frame = frame.with_columns(pl.lit(SPLIT_CODES[split], dtype=pl.Int8).alias("split"))
        interactions.append(frame)
    if len({frame.width for frame in interactions}) > 1:
        raise UserError(
            f"'{folder}': only some files of {name} have the column {rating_column!r}: give all of them it."
        )
    items_path, rows = Path(folder) / f"{name}.item", pl.concat(interactions)
    items = _items(items_path, item_column, title_column, skipped)
    if items_path.is_file():
        check_same_ids(rows, items, f"{name}.inter", items_path)
    return Source(f"recbole: {name}", rows, items, UNITS[timestamp_unit], dropped)


def _find(folder: Path) -> tuple[str, dict[str, Path]]:
    files = sorted(folder.glob("*.inter"))
    names = {re.sub(r"(\.(train|valid|test))?\.inter$", "", file.name) for file in files}
    if len(names) != 1:
        found = f"files of {', '.join(sorted(names))}" if names else "no .inter file"
        raise UserError(f"'{folder}' holds {found}: pass a folder of exactly one dataset in RecBole's atomic format.")
    name = names.pop()
    parts = {split: folder / f"{name}.{word}.inter" for split, word in _PARTS.items()}
    if all(path.is_file() for path in parts.values()):
        return name, parts
    whole = folder / f"{name}.inter"
    if not whole.is_file():
        raise UserError(f"'{folder}' has neither {name}.inter nor all of {name}.train, .valid and .test.inter.")
    return name, {"": whole}


def _typed_names(path: Path) -> dict[str, str]:
    """From a field's name to its header cell, `name:type`."""
    cells = column_names(path, _DIALECT)
    names = [cell.rsplit(":", 1)[0].strip() for cell in cells]
    check_unique(names, path)
    return dict(zip(names, cells))


def _items(path: Path, item_column: str, title_column: str | None, skipped: Counter[str] | None) -> pl.DataFrame:
    if not path.is_file():
        if title_column:
            raise UserError(f"--title_column {title_column!r} needs {path}, which is not there.")
        return pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})
    types = _typed_names(path)
    title = title_column or next((name for name in _TITLES if name in types), None)
    if title is None:
        raise UserError(f"{path} has no title among {listing(types)}: name it with --title_column.")
    for name in (item_column, title):
        if name not in types:
            raise no_column(path, f"'{name}'", types)
    items = import_items(path, types[item_column], types[title], dialect=_DIALECT, skipped=skipped)
    return items.rename({cell: name for name, cell in types.items() if cell in items.columns and name not in items})


KIND = Kind(
    import_recbole,
    "input=folder user_column item_column rating_column time_column title_column timestamp_unit skip_bad_rows",
)
