"""The shape every raw source is brought to: a frame of interactions and a frame of items."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import polars as pl

from r2ec_trl.data.sources.jsonl import reject
from r2ec_trl.errors import UserError

TOO_LATE = 100_000_000_000  # seconds: the year 5138
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
_PARSED = "__parsed__"
SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}


@dataclass
class Source:
    """
    What an importer hands over.

    Args:
        name (`str`):
            For the dataset card: kind of source and what was read.
        interactions (`polars.DataFrame`):
            `user_id` and `item_id` (text), `timestamp` (ticks), optionally `rating` and, where the source is split
            already, `split` (0, 1, 2).
        items (`polars.DataFrame`):
            `item_id`, `title` and any further columns; may hold more items than are bought, or fewer.
        ticks_per_second (`int`, *optional*, defaults to 1):
            Unit of `timestamp`: order is decided in ticks, the dataset folder holds seconds.
        dropped (`Counter`, *optional*):
            Cause and number of what the importer left out.
        item_fields (`tuple[str, ...]`, *optional*):
            Item columns taken when the user chooses none; all by default.
    """

    name: str
    interactions: pl.DataFrame
    items: pl.DataFrame
    ticks_per_second: int = 1
    dropped: Counter[str] = field(default_factory=Counter)
    item_fields: tuple[str, ...] | None = None


def check_interactions(
    frames: Iterable[pl.DataFrame],
    path: str | os.PathLike[str],
    *,
    skipped: Counter[str] | None,
    unit: str = "s",
) -> pl.DataFrame:
    """
    Interactions with the right types, every bad row named or counted.

    Args:
        frames (iterable of `polars.DataFrame`):
            Columns `user_id`, `item_id`, `timestamp`, optionally `rating`, of text or of their own types, and the row
            number [`ROW`].
        path (`str` or `os.PathLike`):
            The file, for the message.
        skipped (`Counter`, *optional*):
            None to raise at the first bad row; otherwise where they are counted.
        unit (`str`, *optional*, defaults to `"s"`):
            What `timestamp` counts: `"s"`, `"ms"` or `"us"`.
    """
    checked = [_check(frame, path, skipped, UNITS[unit]) for frame in frames]
    rows = pl.concat(checked) if checked else pl.DataFrame()
    if rows.is_empty():
        left = "no interaction is left after the bad rows" if checked else "the file is empty"
        raise UserError(f"{path}: {left}, and there must be at least one.")
    return rows


def _check(
    frame: pl.DataFrame, path: str | os.PathLike[str], skipped: Counter[str] | None, ticks: int
) -> pl.DataFrame:
    for column in ("user_id", "item_id"):
        frame = frame.with_columns(pl.col(column).cast(pl.String))
        frame = reject(frame, pl.col(column).is_null() | (pl.col(column) == ""), f"has no {column}", path, skipped)
    columns = ["user_id", "item_id", "timestamp"]
    if "rating" in frame.columns:
        frame = frame.with_columns(pl.col("rating").cast(pl.Float64, strict=False).alias(_PARSED))
        fault = "has a rating that is no number"
        frame = reject(frame, ~pl.col(_PARSED).is_finite(), fault, path, skipped, "rating")
        frame = frame.with_columns(pl.col(_PARSED).alias("rating"))
        columns.insert(2, "rating")
    if "split" in frame.columns:
        columns.append("split")
    frame = frame.with_columns(_ticks(frame["timestamp"], ticks).alias(_PARSED))
    time = pl.col(_PARSED)
    frame = reject(frame, time.is_null(), "has a timestamp that is no whole number", path, skipped, "timestamp")
    frame = reject(frame, time < 0, "has a negative timestamp", path, skipped, "timestamp")
    late = "has a timestamp after the year 5000 (is --timestamp_unit right?)"
    frame = reject(frame, time > TOO_LATE * ticks, late, path, skipped, "timestamp")
    return frame.with_columns(time.alias("timestamp")).select(columns)


def _ticks(time: pl.Series, ticks: int) -> pl.Series:
    """Whole ticks, null where there are none: `881250949`, `8.8e8` and `5.0` are whole numbers, `5.5` is not."""
    if isinstance(time.dtype, (pl.Datetime, pl.Date)):
        return time.cast(pl.Datetime("us")).dt.epoch("us") // (1_000_000 // ticks)
    whole = time.cast(pl.Int64, strict=False) if time.dtype == pl.String or time.dtype.is_integer() else None
    if whole is not None and (whole.null_count() == 0 or time.dtype != pl.String):
        return whole
    number = time.cast(pl.Float64, strict=False)
    value = pl.col(number.name)
    is_whole = value.is_finite() & (value == value.floor())
    rounded = number.to_frame().select(pl.when(is_whole).then(value)).to_series().cast(pl.Int64, strict=False)
    return rounded if whole is None else whole.zip_with(whole.is_not_null(), rounded)
