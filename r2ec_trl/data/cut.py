"""A smaller dataset out of a large one, the same for everybody: for tests, demos and runs on a CPU."""

from __future__ import annotations

import hashlib
from collections import Counter

import polars as pl
from datasets import DatasetDict

from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.schema import ITEMS, SPLITS
from r2ec_trl.errors import UserError

_OUTSIDE = "cut: row whose target is outside the cut"
_THIN = "cut: row that lost more than half of its history"
_HISTORY = "cut: history item outside the cut"
_USERS = "cut: row of a user outside the cut"
_ITEMS = "cut: item"


def cut_dataset(
    dataset: DatasetDict, *, max_items: int | None = None, max_users: int | None = None, dropped: Counter[str]
) -> DatasetDict:
    """
    Keep the most frequent items and some of the users; deterministic, and still a valid dataset.

    Items are counted as targets over all splits (ties: by id). A row stays if its target does and at least half of its
    history; the other history items are taken out of it. Then at most `max_users` users stay *in each split*, those
    whose id has the lowest SHA-256, with all their rows.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            A valid dataset.
        max_items (`int`, *optional*):
            Items to keep; all by default.
        max_users (`int`, *optional*):
            Users to keep in each split; all by default.
        dropped (`Counter`):
            Filled with cause and number of what was left out.
    """
    items = dataset[ITEMS].to_polars()
    rows = {split: dataset[split].to_polars() for split in SPLITS}
    if max_items is not None and max_items < items.height:
        targets = pl.concat([frame.select(item_id="target") for frame in rows.values()])
        counts = targets["item_id"].value_counts(name="frequency")
        ranked = items.join(counts, on="item_id", how="left").sort(
            ["frequency", "item_id"], descending=[True, False], nulls_last=True
        )
        kept = ranked.head(max_items)["item_id"]
        dropped[_ITEMS] += items.height - kept.len()
        items = items.filter(pl.col("item_id").is_in(kept.implode()))
        rows = {split: _inside(frame, kept, dropped) for split, frame in rows.items()}
    if max_users is not None:
        rows = {split: _some_users(frame, max_users, dropped) for split, frame in rows.items()}
    for split, frame in rows.items():
        if frame.is_empty():
            raise UserError(f"The cut leaves no row in split '{split}': raise --max_items or --max_users.")
    return DatasetDict({split: to_dataset(frame) for split, frame in {**rows, ITEMS: items}.items()})


def _inside(rows: pl.DataFrame, kept: pl.Series, dropped: Counter[str]) -> pl.DataFrame:
    inside = rows.filter(pl.col("target").is_in(kept.implode()))
    dropped[_OUTSIDE] += rows.height - inside.height
    if inside.is_empty():
        return inside
    lists = [column for column in inside.columns if column.startswith("history")]
    numbered = inside.with_row_index("position").with_columns(length=pl.col("history").list.len())
    flat = numbered.select("position", *lists).explode(lists).filter(pl.col("history").is_in(kept.implode()))
    short = flat.group_by("position", maintain_order=True).agg(lists)
    result = numbered.drop(lists).join(short, on="position", maintain_order="left")
    thin = pl.col("history").list.len() * 2 < pl.col("length")
    result = result.filter(~thin)
    dropped[_THIN] += inside.height - result.height
    dropped[_HISTORY] += int(result.select(pl.col("length").sum() - pl.col("history").list.len().sum()).item())
    return result.select(inside.columns)


def _some_users(rows: pl.DataFrame, max_users: int, dropped: Counter[str]) -> pl.DataFrame:
    users = sorted(rows["user_id"].unique().to_list(), key=lambda user: hashlib.sha256(user.encode()).digest())
    kept = rows.filter(pl.col("user_id").is_in(users[:max_users]))
    dropped[_USERS] += rows.height - kept.height
    return kept
