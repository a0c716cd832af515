"""Any CSV, TSV, JSON-lines or parquet file with named columns."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import polars as pl

from r2ec_trl.data.sources.delimited import Dialect, column_names, is_json, no_column, read_table
from r2ec_trl.data.sources.jsonl import ROW, read_objects, reject
from r2ec_trl.data.sources.source import (
    SPLIT_CODES,
    UNIT_FLAG,
    UNITS,
    Kind,
    Source,
    check_interactions,
    check_same_ids,
    checked_items,
)
from r2ec_trl.errors import UserError

_SPLIT_WORDS = {"train": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}


def import_table(
    path: str | os.PathLike[str],
    items_path: str | os.PathLike[str] | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    rating_column: str | None = "rating",
    time_column: str = "timestamp",
    split_column: str | None = None,
    title_column: str | None = None,
    timestamp_unit: str = "s",
    skip_bad_rows: bool = False,
) -> Source:
    """
    Read interactions, and optionally items, from table files with named columns.

    Args:
        path (`str` or `os.PathLike`):
            Interactions: `.csv`, `.tsv`, `.jsonl` (each also `.gz`) or `.parquet`.
        items_path (`str` or `os.PathLike`, *optional*):
            Items: the item column, a title and further columns, which are all read. Without it, items are named by
            their id (`missing_title="id"`).
        user_column, item_column, time_column (`str`):
            Names of the columns.
        title_column (`str`, *optional*):
            The items' title; `title` by default.
        rating_column (`str`, *optional*, defaults to `"rating"`):
            A file without it has no ratings.
        split_column (`str`, *optional*):
            Column that holds train, valid(ation) or test, for the split rule `given`.
        timestamp_unit (`str`, *optional*, defaults to `"s"`):
            `"s"`, `"ms"`, `"us"` or `"ns"`; a date column of a parquet file needs none.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out and count them.
    """
    dropped: Counter[str] = Counter()
    skipped = dropped if skip_bad_rows else None
    for one in (path, items_path):
        if one is not None and os.path.isdir(one):
            raise UserError(f"{one} is a folder: join the files in it into one, and give that.")
    columns = {"user_id": user_column, "item_id": item_column, "timestamp": time_column}
    if rating_column:
        columns["rating"] = rating_column
    if split_column:
        columns["split"] = split_column
    optional = ["rating"] if rating_column == "rating" else []
    frames = read_table(path, columns, optional=optional, skipped=skipped)
    if split_column:
        frames = (_coded_split(frame, path, skipped) for frame in frames)
    interactions = check_interactions(frames, path, skipped=skipped, unit=timestamp_unit, flag=UNIT_FLAG)
    if items_path is None:
        items = pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})
    else:
        items = import_items(items_path, item_column, title_column or "title", skipped=skipped)
        check_same_ids(interactions, items, path, items_path)
    return Source(f"table: {Path(path).name}", interactions, items, UNITS[timestamp_unit], dropped)


def import_items(
    path: str | os.PathLike[str],
    item_column: str,
    title_column: str,
    *,
    dialect: Dialect | None = None,
    skipped: Counter[str] | None = None,
) -> pl.DataFrame:
    """All columns of an item file, with `item_id` and `title` first; rows without an id are bad rows."""
    if dialect is None and is_json(path):
        return checked_items(_json_items(path, item_column, title_column, skipped), path, skipped)
    found = column_names(path, dialect)
    for name in (item_column, title_column):
        if name not in found:
            raise no_column(path, f"'{name}'", found)
    taken = (item_column, title_column, "item_id", "title", ROW)
    others = {name: name for name in found if name not in taken}
    columns = {"item_id": item_column, "title": title_column, **others}
    frames = list(read_table(path, columns, dialect=dialect, skipped=skipped))
    if not frames:
        raise UserError(f"{path} is empty: a catalogue needs at least one item.")
    return checked_items(pl.concat(frames), path, skipped)


def _json_items(
    path: str | os.PathLike[str], item_column: str, title_column: str, skipped: Counter[str] | None
) -> pl.DataFrame:
    """Items of JSON lines; a key that no line has is a column that the file lacks."""
    names = (
        {item_column: "item_id"} if item_column == title_column else {item_column: "item_id", title_column: "title"}
    )
    items = read_objects(path, names, skipped)
    for source, name in names.items():
        if items[name].null_count() == items.height:
            others = [one for one in items.columns if one not in (name, ROW)]
            raise no_column(
                path, f"'{source}'", [{new: old for old, new in names.items()}.get(one, one) for one in others]
            )
    return items if "title" in items.columns else items.with_columns(title="item_id")


def _coded_split(frame: pl.DataFrame, path: str | os.PathLike[str], skipped: Counter[str] | None) -> pl.DataFrame:
    word = pl.col("split").cast(pl.String).str.to_lowercase()
    code = word.replace_strict(_SPLIT_WORDS, default=None, return_dtype=pl.Int8)
    fault = f"is in none of the splits {', '.join(SPLIT_CODES)}"
    return reject(frame, code.is_null(), fault, path, skipped, "split").with_columns(split=code)


KIND = Kind(
    import_table,
    "input=path items=items_path user_column item_column rating_column time_column split_column title_column "
    "timestamp_unit skip_bad_rows",
)
