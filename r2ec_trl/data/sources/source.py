"""The shape every raw source is brought to: a frame of interactions and a frame of items."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from r2ec_trl.data.sources.delimited import is_index
from r2ec_trl.data.sources.jsonl import ROW, listing, reject
from r2ec_trl.errors import UserError

logger = logging.getLogger(__name__)

TOO_LATE = 100_000_000_000  # seconds: the year 5138
LONGEST_ID = 10_000  # bytes: a longer one is no id
STARS = 5  # what prompts say ratings are out of
_CLOCKS = (" %H:%M", " %H:%M:%S%.f")
UNIT_FLAG = "--timestamp_unit"
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# how other programs write that there is nothing
MISSING = ("NA", "NaN", "nan", "<NA>", "NaT", "None", "null", "NULL", "N/A", "n/a", "#N/A", "\\N")
_PARSED = "__parsed__"
SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class Kind:
    """
    A kind of source, for the registry.

    Args:
        read (`Callable`):
            Gives a [`Source`], or the four splits where the source is `ready`.
        flags (`str`):
            The recipe's flags that `read` has a parameter for: `flag`, or `flag=parameter` where the names differ.
        needs (`tuple[str, ...]`, *optional*):
            Flags it cannot do without.
        ready (`bool`, *optional*, defaults to `False`):
            Split and cut into windows already: flags of filters and splits do not apply.
    """

    read: Callable[..., Any]
    flags: str
    needs: tuple[str, ...] = ("input",)
    ready: bool = False

    @property
    def parameters(self) -> dict[str, str]:
        """From flag to parameter."""
        pairs = (word.partition("=") for word in self.flags.split())
        return {flag: parameter or flag for flag, _, parameter in pairs}


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
    flag: str = "",
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
            What `timestamp` counts: `"s"`, `"ms"`, `"us"` or `"ns"`.
        flag (`str`, *optional*):
            The flag by which the user chose it, where the source leaves a choice.
    """
    if unit not in UNITS:
        raise UserError(f"{UNIT_FLAG} {unit!r} is unknown: choose one of {', '.join(UNITS)}.")
    checked = [_check(frame, path, skipped, unit, flag) for frame in frames]
    rows = pl.concat(checked) if checked else pl.DataFrame()
    if rows.is_empty():
        left = "no interaction is left after the bad rows" if checked else "the file is empty"
        raise UserError(f"{path}: {left}, and there must be at least one.")
    if "rating" in rows.columns and (rows["rating"].max() or 0) > STARS:  # type: ignore[operator]
        logger.warning(
            "%s: some ratings are above %d, and prompts say 'out of %d': train with --use_ratings false.",
            path,
            STARS,
            STARS,
        )
    latest: Any = rows["timestamp"].max()
    if _fitting(latest, unit, finer=False):
        logger.warning("%s: no time is after 1973 %s.", path, _other_unit(latest, unit, flag, finer=False))
    if len(rows) > 1 and rows["timestamp"].min() == latest:
        logger.warning("%s: every row has the same time, so that the order of a user's items is chance.", path)
    if 19_000_101 <= rows["timestamp"].min() and latest <= 21_001_231:  # type: ignore[operator]
        logger.warning(
            "%s: times such as %d are taken as %s since 1970; write days as 2020-01-31.", path, latest, unit
        )
    return rows


def _check(
    frame: pl.DataFrame, path: str | os.PathLike[str], skipped: Counter[str] | None, unit: str, flag: str
) -> pl.DataFrame:
    ticks = UNITS[unit]
    frame = checked_ids(frame, ("user_id", "item_id"), path, skipped)
    text = [name for name in ("rating", "timestamp", "split") if frame.schema.get(name) == pl.String]
    frame = frame.with_columns(pl.col(text).str.strip_chars())
    columns = ["user_id", "item_id", "timestamp"]
    if "rating" in frame.columns:
        frame = frame.with_columns(pl.col("rating").cast(pl.Float64, strict=False).alias(_PARSED))
        fault = "has a rating that is no number"
        frame = reject(frame, ~pl.col(_PARSED).is_finite(), fault, path, skipped, "rating")
        frame = frame.with_columns(pl.col(_PARSED).alias("rating"))
        columns.insert(2, "rating")
    if "split" in frame.columns:
        columns.append("split")
    frame = frame.with_columns(_ticks(frame["timestamp"], ticks, path).alias(_PARSED))
    time = pl.col(_PARSED)
    frame = reject(
        frame, time.is_null(), "has a timestamp that is no whole number and no date", path, skipped, "timestamp"
    )
    frame = reject(frame, time < 0, "has a negative timestamp", path, skipped, "timestamp")
    late = time > min(TOO_LATE * ticks, 2**63 - 1)
    latest: Any = frame[_PARSED].max() or 0
    fault = f"has a timestamp after the year 5000 {_other_unit(latest, unit, flag)}"
    frame = reject(frame, late, fault, path, skipped, "timestamp")
    return frame.with_columns(time.alias("timestamp")).select(columns)


def _fitting(latest: int, unit: str, finer: bool) -> list[str]:
    """The units, all finer or all coarser than this one, in which the latest time would be of our days."""
    units = UNITS.items() if finer else list(UNITS.items())[::-1]
    others = (name for name, ticks in units if ticks != UNITS[unit] and (ticks > UNITS[unit]) is finer)
    return [name for name in others if 1e8 < latest / UNITS[name] < 1e10]


def _other_unit(latest: int, unit: str, flag: str, finer: bool = True) -> str:
    """For the sentence about times of no days that anybody saw: what they would fit, and what can be done."""
    fits = "".join(f" {name} would fit" for name in _fitting(latest, unit, finer)[:1])
    return f"(is {flag} right?{fits})" if flag else f"(this source counts in {unit};{fits or ' convert them'})"


def checked_ids(
    frame: pl.DataFrame, columns: Sequence[str], path: str | os.PathLike[str], skipped: Counter[str] | None
) -> pl.DataFrame:
    """Columns of ids as text without blanks around it: whole numbers plainly (`3.0` of a float column is `3`)."""
    for column in columns:
        ids = frame[column]
        if ids.dtype.is_float():
            whole = ids.cast(pl.Int64, strict=False)
            is_whole = (whole.cast(ids.dtype) == ids).fill_null(False)
            ids = whole.cast(pl.String).zip_with(is_whole, ids.cast(pl.String))
        ids = ids.cast(pl.String).str.strip_chars()
        frame = frame.with_columns(ids)
        long = pl.col(column).str.len_bytes() > LONGEST_ID
        frame = reject(
            frame, long & pl.col(column).is_not_null(), f"has a {column} of over {LONGEST_ID:,} bytes", path, skipped
        )
        bad = pl.col(column).is_null() | pl.col(column).is_in(["", *MISSING])
        frame = reject(frame, bad, f"has no {column}", path, skipped)
    return frame


def checked_items(
    items: pl.DataFrame, path: str | os.PathLike[str], skipped: Counter[str] | None, strict: bool = False
) -> pl.DataFrame:
    """
    The catalogue as importers hand it over: ids as [`checked_ids`] says, words that mean "nothing" as null, no column
    that is an index. With `strict` an item without a title, or listed again, is a bad row.
    """
    index = [name for name in items.columns if is_index(name)]
    if index:
        logger.warning("%s: column %s is an index without a name and is left out.", path, listing(index))
    items = checked_ids(items.drop(index).with_columns(pl.col("title").cast(pl.String)), ("item_id",), path, skipped)
    text = [pl.col(name) for name, kind in items.schema.items() if kind == pl.String]
    items = items.with_columns(pl.when(~name.str.strip_chars().is_in(["", *MISSING])).then(name) for name in text)
    if strict:
        items = reject(items, pl.col("title").is_null(), "has no title", path, skipped)
        items = reject(items, ~pl.col("item_id").is_first_distinct(), "repeats an item_id", path, skipped, "item_id")
    return items.drop(ROW)


def check_same_ids(interactions: pl.DataFrame, items: pl.DataFrame, path: object, items_path: object) -> None:
    """Raise [`UserError`] if no interaction is with an item of the catalogue: then the ids are written otherwise."""
    known = interactions["item_id"].is_in(items["item_id"].implode())
    if not known.any():
        there = f"{items['item_id'][0]!r} is one of {items_path}" if items.height else f"{items_path} has none"
        raise UserError(
            f"No item of {path} is in the catalogue: {interactions['item_id'][0]!r} is one of its ids, {there}: write "
            "the ids in one way."
        )


def _ticks(time: pl.Series, ticks: int, path: object) -> pl.Series:
    """Whole ticks, null where there are none: `881250949`, `8.8e8` and `5.0` are whole numbers, `5.5` is not."""
    if isinstance(time.dtype, (pl.Datetime, pl.Date)):
        unit: Any = "ns" if ticks == UNITS["ns"] else "us"
        parts, size = time.cast(pl.Datetime(unit)).dt.epoch(unit), UNITS[unit] // ticks
        if (parts % size != 0).any():
            _tell_lost_parts(str(path), ticks)
        return parts // size
    whole = time.cast(pl.Int64, strict=False) if time.dtype == pl.String or time.dtype.is_integer() else None
    if whole is not None and (whole.null_count() == 0 or time.dtype != pl.String):
        return whole
    number = time.cast(pl.Float64, strict=False)
    value = pl.col(number.name)
    is_whole = value.is_finite() & (value == value.floor())
    rounded = number.to_frame().select(pl.when(is_whole).then(value)).to_series().cast(pl.Int64, strict=False)
    found = rounded if whole is None else whole.zip_with(whole.is_not_null(), rounded)
    if time.dtype != pl.String or found.null_count() == 0:
        return found
    return found.zip_with(found.is_not_null(), _ticks(_dates(time), ticks, path))


@functools.cache
def _tell_lost_parts(path: str, ticks: int) -> None:
    """Once a file, however many blocks it is read in."""
    logger.warning(
        "%s: some times are finer than 1/%d s, within which order is chance: count in a finer unit.",
        path,
        ticks,
    )


def _dates(text: pl.Series) -> pl.Series:
    """Moments (UTC where no zone is given) of `2018-09-20`, `2018-07-07 22:09 UTC`, `2020-01-01T00:00Z`; else null."""
    text = text.str.replace(" UTC$|[Zz]$", "+00:00").str.replace("[Tt]", " ")
    naive = [text.str.to_datetime(f"%Y-%m-%d{clock}", time_unit="ns", strict=False) for clock in ("", *_CLOCKS)]
    zoned = [text.str.to_datetime(f"%Y-%m-%d{clock}%z", time_unit="ns", strict=False) for clock in _CLOCKS]
    moments = [*naive, *(one.dt.convert_time_zone("UTC").dt.replace_time_zone(None) for one in zoned)]
    return (
        pl.DataFrame({str(place): one for place, one in enumerate(moments)}).select(pl.coalesce(pl.all())).to_series()
    )
