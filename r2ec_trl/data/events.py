"""Interactions as sorted arrays of codes, and what is filtered out of them: repeats, time window, k-core."""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import polars as pl

from r2ec_trl.data.sources.source import Source
from r2ec_trl.data.stable_hash import mix, text_hashes
from r2ec_trl.errors import UserError


@dataclass(frozen=True)
class Events:
    """
    Interactions in the order of a history: by user, then time, then tie-break.

    Args:
        user (`np.ndarray`):
            Position of the user's id in `user_ids`.
        item (`np.ndarray`):
            Position of the item's id in `item_ids`.
        time (`np.ndarray`):
            Ticks.
        rating (`np.ndarray`, *optional*):
            Ratings.
        split (`np.ndarray`, *optional*):
            0, 1, 2 where the source is split already.
        user_ids (`polars.Series`):
            Sorted ids; codes are positions in it.
        item_ids (`polars.Series`):
            Sorted ids; codes are positions in it.
        ticks_per_second (`int`):
            Unit of `time`.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: np.ndarray | None
    split: np.ndarray | None
    user_ids: pl.Series
    item_ids: pl.Series
    ticks_per_second: int

    def __len__(self) -> int:
        return len(self.user)

    def keep(self, mask: np.ndarray) -> Events:
        """The events where `mask` holds, in the same order."""
        if mask.all():
            return self
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        return replace(self, **{name: array[mask] for name, array in arrays.items()})


def sort_events(source: Source, tie_break: str = "hash") -> Events:
    """
    Interactions of a source in history order.

    Equal timestamps of a user are ordered by a hash of user and item (`"hash"`: whatever order the rows come in, and
    no item is always first, which a model could learn), by item id (`"item"`) or as they stand in the file (`"file"`).
    """
    frame = source.interactions
    user_ids = frame["user_id"].unique().sort()
    item_ids = frame["item_id"].unique().sort()
    coded = frame.select(
        user=pl.col("user_id").cast(pl.Enum(user_ids)).to_physical().cast(pl.UInt32),
        item=pl.col("item_id").cast(pl.Enum(item_ids)).to_physical().cast(pl.UInt32),
        time=pl.col("timestamp"),
        **{name: pl.col(name) for name in ("rating", "split") if name in frame.columns},
    )
    coded = coded.sort(_history_key(coded), maintain_order=True)
    if tie_break != "file":
        coded = _order_ties(coded, user_ids, item_ids, tie_break)
    return Events(
        user=coded["user"].to_numpy(),
        item=coded["item"].to_numpy(),
        time=coded["time"].to_numpy(),
        rating=coded["rating"].to_numpy() if "rating" in coded.columns else None,
        split=coded["split"].to_numpy() if "split" in coded.columns else None,
        user_ids=user_ids,
        item_ids=item_ids,
        ticks_per_second=source.ticks_per_second,
    )


def _history_key(coded: pl.DataFrame) -> pl.Series | list[str]:
    """User and time in one number where they fit into 64 bits, which sorts in half the time."""
    user, time = coded["user"].to_numpy().astype(np.uint64), coded["time"].to_numpy()
    first = time.min()
    bits = int(time.max() - first).bit_length()
    if bits + int(user.max()).bit_length() > 64:
        return ["user", "time"]
    return pl.Series((user << np.uint64(bits)) | (time - first).astype(np.uint64))


def _order_ties(coded: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series, tie_break: str) -> pl.DataFrame:
    """Order the runs of the same user and time among themselves, so that the order of the file does not matter."""
    user, item, time = (coded[name].to_numpy() for name in ("user", "item", "time"))
    same = np.r_[False, (user[1:] == user[:-1]) & (time[1:] == time[:-1])]
    tied = np.flatnonzero(same | np.r_[same[1:], False])
    if not len(tied):
        return coded
    part = coded[tied].with_columns(run=pl.Series(np.cumsum(~same)[tied]))
    keys = ["run", "item", *(name for name in ("rating", "split") if name in coded.columns)]
    if tie_break == "hash":
        user_hash, item_hash = text_hashes(user_ids), text_hashes(item_ids)
        part = part.with_columns(tie=pl.Series(mix(mix(user_hash[user[tied]]) ^ item_hash[item[tied]])))
        keys.insert(1, "tie")
    part = part.sort(keys).select(coded.columns)
    places = np.arange(len(coded))
    places[tied] = len(coded) + np.arange(len(tied))
    return pl.concat([coded, part])[places]


def drop_repeats(events: Events, repeats: str, dropped: Counter[str]) -> Events:
    """
    Drop duplicates (same user, item and second; the first stays), and of the same item bought again by the same user
    keep all (`"keep"`), the `"first"` or the `"last"`.
    """
    mask = _first_of_second(events)
    dropped["duplicate of user, item and second"] += int(len(mask) - mask.sum())
    events = events.keep(mask)
    if repeats != "keep":
        pair = pl.Series(pairs(events))
        mask = (pair.is_first_distinct() if repeats == "first" else pair.is_last_distinct()).to_numpy()
        dropped[f"repeat of user and item (kept: {repeats})"] += int(len(mask) - mask.sum())
        events = events.keep(mask)
    return events


def pairs(events: Events) -> np.ndarray:
    """User and item of each event in one number."""
    return (events.user.astype(np.uint64) << np.uint64(32)) | events.item


def _first_of_second(events: Events) -> np.ndarray:
    """False where the same user has the same item in the same second before; only such seconds are looked at."""
    second = events.time // events.ticks_per_second
    same = np.r_[False, (events.user[1:] == events.user[:-1]) & (second[1:] == second[:-1])]
    shared = np.flatnonzero(same | np.r_[same[1:], False])
    columns = {"pair": pairs(events)[shared], "second": second[shared]}
    mask = np.ones(len(events), bool)
    mask[shared] = pl.DataFrame(columns).select(pl.struct("pair", "second").is_first_distinct()).to_series().to_numpy()
    return mask


def drop_items(events: Events, items: pl.Series, cause: str, dropped: Counter[str]) -> Events:
    """Drop the interactions whose item is not among `items`."""
    known = events.item_ids.is_in(items.implode()).to_numpy()
    mask = known[events.item]
    dropped[f"interaction with {cause}"] += int(len(mask) - mask.sum())
    return events.keep(mask)


def k_core(events: Events, user_core: int, item_core: int, dropped: Counter[str] | None = None) -> Events:
    """Drop users and items with too few interactions until none is left, as each drop can make others too few."""
    user, item = events.user, events.item
    alive = np.arange(len(events))
    while True:
        enough = np.ones(len(alive), bool)
        if user_core > 1:
            enough &= (np.bincount(user) >= user_core)[user]
        if item_core > 1:
            enough &= (np.bincount(item) >= item_core)[item]
        if enough.all():
            break
        user, item, alive = user[enough], item[enough], alive[enough]
    if dropped is not None and (user_core > 1 or item_core > 1):
        dropped[f"{user_core}/{item_core}-core of users/items"] += len(events) - len(alive)
    mask = np.zeros(len(events), bool)
    mask[alive] = True
    return events.keep(mask)


def time_window(
    events: Events,
    start: datetime.datetime | None,
    end: datetime.datetime | None,
    *,
    min_items: int,
    step_months: int,
    cores: tuple[int, int],
    dropped: Counter[str],
) -> tuple[Events, datetime.datetime | None]:
    """
    Keep `start <= time < end`; while fewer than `min_items` items are left after the k-core, move the start back by
    `step_months` (the paper's window). Returns the events of the window, before the k-core, and its start.
    """
    ticks = events.ticks_per_second
    if min_items and step_months < 1:
        raise UserError(f"--window_step_months {step_months} moves no window: give at least 1.")
    before_end = events.keep(events.time < _epoch(end) * ticks) if end else events
    if not len(before_end):
        raise UserError(f"No interaction is before --window_end {end:%Y-%m-%d}: move it.")
    earliest = int(before_end.time.min())
    while True:
        window = before_end.keep(before_end.time >= _epoch(start) * ticks) if start else before_end
        enough = not min_items or len(np.unique(k_core(window, *cores).item)) >= min_items
        if enough or start is None or _epoch(start) * ticks <= earliest:
            dropped["interaction outside the time window"] += len(events) - len(window)
            return window, start
        start = _months_before(start, step_months)


def _epoch(date: datetime.datetime) -> int:
    return int(date.timestamp())


def _months_before(date: datetime.datetime, months: int) -> datetime.datetime:
    month = max(date.year * 12 + date.month - 1 - months, 12)  # the year 1 is before all
    return date.replace(year=month // 12, month=month % 12 + 1, day=min(date.day, 28))


def parse_date(text: str | None, flag: str) -> datetime.datetime | None:
    """A date such as `2022-10-01` (midnight, UTC); None for None."""
    if text is None:
        return None
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r} is no date such as 2022-10-01: mend it.") from error
    return date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)
