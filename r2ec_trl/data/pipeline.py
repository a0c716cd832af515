"""The way from a raw source to the four splits: filters, order, split, windows, item text, every drop counted."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from datasets import DatasetDict

from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.events import Events, drop_repeats, k_core, pairs, sort_events, time_window
from r2ec_trl.data.item_filter import ItemFilter, filter_items
from r2ec_trl.data.rows import write_rows
from r2ec_trl.data.schema import ITEMS
from r2ec_trl.data.sources.source import Source
from r2ec_trl.data.splits import SplitRule, largest_causes, split_targets
from r2ec_trl.data.text import item_text
from r2ec_trl.errors import UserError
from r2ec_trl.progress import report


@dataclass(frozen=True)
class Filters:
    """
    What is filtered out of the interactions; repeats go first.

    Args:
        min_rating (`float`, *optional*):
            Interactions rated lower are dropped.
        repeats (`str`, *optional*, defaults to `"keep"`):
            The same item again by the same user: keep all, the `"first"` or the `"last"`.
        window_start (`datetime.datetime`, *optional*):
            Earlier interactions are dropped.
        window_end (`datetime.datetime`, *optional*):
            Interactions at or after it are dropped.
        window_min_items (`int`, *optional*, defaults to 0):
            Move the start back until so many items are left.
        window_step_months (`int`, *optional*, defaults to 1):
            By so many months at a time.
        user_core (`int`, *optional*, defaults to 0):
            Fewest interactions of a user.
        item_core (`int`, *optional*, defaults to 0):
            Fewest interactions of an item.
        tie_break (`str`, *optional*, defaults to `"hash"`):
            Order of a user's interactions at the same time: `"hash"`, `"item"` or `"file"`.
    """

    min_rating: float | None = None
    repeats: str = "keep"
    window_start: datetime.datetime | None = None
    window_end: datetime.datetime | None = None
    window_min_items: int = 0
    window_step_months: int = 1
    user_core: int = 0
    item_core: int = 0
    tie_break: str = "hash"


@dataclass
class Prepared:
    """
    What comes out of [`prepare`].

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The four splits, memory-mapped from the scratch folder.
        dropped (`Counter`):
            Cause and number of everything left out.
        facts (`dict`):
            What only the way here knows: interactions, users and items kept, ties, the window's start.
    """

    dataset: DatasetDict
    dropped: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(
    source: Source,
    rule: SplitRule,
    scratch: str | os.PathLike[str],
    *,
    filters: Filters | None = None,
    item_filter: ItemFilter | None = None,
    item_fields: Sequence[str] | None = None,
    max_field_words: int | None = None,
) -> Prepared:
    """
    Bring a raw source to the shape of a dataset folder.

    Args:
        source ([`~r2ec_trl.data.sources.source.Source`]):
            Interactions and items.
        rule ([`~r2ec_trl.data.splits.SplitRule`]):
            Split rule and history window.
        scratch (`str` or `os.PathLike`):
            Existing folder for the memory-mapped rows; must outlive the result.
        filters ([`Filters`], *optional*):
            What is filtered out of the interactions.
        item_filter ([`~r2ec_trl.data.item_filter.ItemFilter`], *optional*):
            What is filtered out of the items.
        item_fields (`Sequence[str]`, *optional*):
            Item columns to keep besides the title; the source's choice by default.
        max_field_words (`int`, *optional*):
            Words kept of each item field.
    """
    rule.check()
    filters = filters or Filters()
    dropped = Counter(source.dropped)
    report("ordering, filtering, splitting", 0, 3)
    facts: dict[str, Any] = {"raw_interactions": source.interactions.height}
    fields = source.item_fields if item_fields is None else item_fields
    with ThreadPoolExecutor(1) as pool:  # polars leaves the interpreter free
        cleaning = pool.submit(item_text, source.items, fields, max_field_words)
        events = sort_events(source, filters.tie_break)
        items = cleaning.result()
    report("ordering, filtering, splitting", 1, 3)
    events = drop_repeats(events, filters.repeats, dropped)
    if filters.min_rating is not None:
        events = _drop_low_ratings(events, filters.min_rating, dropped)
    events, items = filter_items(events, items, source.items, item_filter or ItemFilter(), dropped)
    if len(events) and (filters.window_start or filters.window_end):
        events, start = time_window(
            events,
            filters.window_start,
            filters.window_end,
            min_items=filters.window_min_items,
            step_months=filters.window_step_months,
            cores=(filters.user_core, filters.item_core),
            dropped=dropped,
        )
        facts["window_start"] = f"{start:%Y-%m-%d}" if start else None
    events = k_core(events, filters.user_core, filters.item_core, dropped)
    if not len(events):
        raise UserError(
            f"Nothing is left of {source.interactions.height:,} interactions after filtering "
            f"({largest_causes(dropped)}): filter less (--k_core, --min_rating, the time window)."
        )
    facts.update(_facts(events))
    targets = split_targets(events, rule, dropped)
    report("ordering, filtering, splitting", 2, 3)
    with ThreadPoolExecutor() as pool:
        writing = {
            split: pool.submit(write_rows, part, Path(scratch) / f"{split}.arrow", rule.max_history)
            for split, part in targets.items()
        }
        splits = {split: future.result() for split, future in writing.items()}
    splits[ITEMS] = to_dataset(_catalogue(items, events))
    report("ordering, filtering, splitting", 3, 3)
    return Prepared(DatasetDict(splits), Counter({cause: count for cause, count in dropped.items() if count}), facts)


def _drop_low_ratings(events: Events, min_rating: float, dropped: Counter[str]) -> Events:
    if events.rating is None:
        raise UserError("--min_rating needs ratings, and this source has none: leave it out.")
    high = events.rating >= min_rating
    dropped[f"rating below {min_rating:g}"] += int(len(high) - high.sum())
    return events.keep(high)


def _catalogue(items: pl.DataFrame, events: Events) -> pl.DataFrame:
    """The items of the remaining interactions, by id."""
    bought = events.item_ids.gather(pl.Series(events.item).unique())
    return items.filter(pl.col("item_id").is_in(bought.implode())).sort("item_id")


def _facts(events: Events) -> dict[str, Any]:
    same_user = events.user[1:] == events.user[:-1]
    tied = same_user & (events.time[1:] == events.time[:-1])
    users, items, distinct = (pl.Series(codes).n_unique() for codes in (events.user, events.item, pairs(events)))
    return {
        "interactions": len(events),
        "users": users,
        "items": items,
        "density": len(events) / (users * items),
        "repeated_purchases": len(events) - distinct,
        "tied_with_the_one_before": int(tied.sum()),
        "tied_share": float(tied.sum() / max(same_user.sum(), 1)),
    }
