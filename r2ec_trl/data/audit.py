"""What a dataset folder holds and whether it can be trusted: counts, cold users and items, ties, leakage."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.schema import ITEMS, SPLITS, arrow_batches, load_dataset_card, load_dataset_folder
from r2ec_trl.data.stable_hash import mix

LENGTH_BUCKETS = (1, 2, 3, 5, 10, 20, 50, 100)
# A breach of one of these is leakage: the split cannot be trusted.
LEAKS = {
    "history_after_target": "rows with a history item later than the target",
    "history_out_of_order": "rows whose history is not oldest first",
    "row_in_two_splits": "targets that are in two splits",
    "train_after_held_out": "train rows later than a held-out target of the same user",
    "splits_overlap_in_time": "train or validation targets later than the next split begins",
}


class _Columns:
    """The columns of a split as codes and numbers, histories reduced batch by batch."""

    def __init__(self, rows: Dataset, items: pa.Array, users: pa.Array):
        parts: dict[str, list[np.ndarray]] = {}
        self.in_histories = np.zeros(len(items), np.int64)
        for table in arrow_batches(rows):
            for name, values in self._reduce(table, items, users).items():
                parts.setdefault(name, []).append(values)
        self.parts = {name: np.concatenate(values) for name, values in parts.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.parts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def _reduce(self, table: pa.Table, items: pa.Array, users: pa.Array) -> dict[str, np.ndarray]:
        lengths = pc.list_value_length(table["history"]).to_numpy()
        starts = np.r_[0, np.cumsum(lengths)[:-1]]
        history = _codes(pc.list_flatten(table["history"]), items)
        target = _codes(table["target"], items)
        self.in_histories += np.bincount(history, minlength=len(self.in_histories))
        position = np.arange(len(history)) - np.repeat(starts, lengths)
        steps = mix((history.astype(np.uint64) << np.uint64(24)) + position.astype(np.uint64))
        out = {
            "user": _codes(table["user_id"], users),
            "target": target,
            "length": lengths,
            "last": history[starts + lengths - 1],
            "history_hash": np.add.reduceat(steps, starts),
            "repeats": np.add.reduceat((history == np.repeat(target, lengths)).astype(np.int64), starts) > 0,
        }
        if "timestamp" in table.column_names:
            out["time"] = table["timestamp"].to_numpy()
        if "history_timestamps" in table.column_names:
            times = pc.list_flatten(table["history_timestamps"]).to_numpy()
            earlier = np.r_[False, times[1:] < times[:-1]]
            earlier[starts] = False
            out["unordered"] = np.add.reduceat(earlier.astype(np.int64), starts) > 0
            out["newest"] = np.maximum.reduceat(times, starts)
        return out


def _codes(values: pa.ChunkedArray, ids: pa.Array) -> np.ndarray:
    return pc.index_in(values.cast(pa.string()), value_set=ids).to_numpy()


def audit_dataset(dataset: DatasetDict, split_rule: str | None = None) -> dict[str, Any]:
    """
    Audit a valid dataset.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The four splits.
        split_rule (`str`, *optional*):
            Rule from the card: under a rule by time, splits must not overlap in time.

    Returns:
        `dict`: `splits` (one table of figures a split), `catalogue`, `leakage` (cause → rows) and `notes` (what a
        reader should know but is no leakage).
    """
    items = _whole(dataset[ITEMS], "item_id")
    users = pc.unique(
        pa.chunked_array([chunk for split in SPLITS for chunk in _whole(dataset[split], "user_id").chunks])
    )
    items, users = (ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids for ids in (items, users))
    columns = {split: _Columns(dataset[split], items, users) for split in SPLITS}
    trained_users = _present(columns["train"]["user"], len(users))
    trained_items = (columns["train"].in_histories + np.bincount(columns["train"]["target"], minlength=len(items))) > 0
    as_target = _present(columns["train"]["target"], len(items))
    splits = {
        split: _split_figures(columns[split], trained_users, trained_items, as_target, len(users)) for split in SPLITS
    }
    return {
        "splits": splits,
        "users": len(users),
        "catalogue": _catalogue_figures(dataset[ITEMS], trained_items, as_target),
        "leakage": _leakage(columns, split_rule),
        "notes": _notes(columns, split_rule),
    }


def check_folder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """
    Audit an existing dataset folder.

    Returns:
        `tuple`: the audit, and one sentence for each thing that is wrong with the folder: leakage, or rows that are
        not those the card's SHA-256 was taken of.
    """
    dataset, card = load_dataset_folder(path), load_dataset_card(path)
    audit = audit_dataset(dataset, card["split_rule"])
    faults = [f"{count:,} {LEAKS[cause]}" for cause, count in audit["leakage"].items() if count]
    for split in (*SPLITS, ITEMS):
        if sha256_of(arrow_batches(dataset[split])) != card.get("sha256", {}).get(split):
            faults.append(f"the rows of '{split}' are not those of the card's SHA-256")
    return audit, faults


def _whole(rows: Dataset, column: str) -> pa.ChunkedArray:
    return pa.chunked_array(
        [table[column].cast(pa.string()).combine_chunks() for table in arrow_batches(rows.select_columns(column))]
    )


def _present(codes: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(codes, minlength=size) > 0


def _split_figures(
    columns: _Columns, trained_users: np.ndarray, trained_items: np.ndarray, as_target: np.ndarray, users: int
) -> dict[str, Any]:
    rows, length = len(columns["user"]), columns["length"]
    present = _present(columns["user"], users)
    edges = np.searchsorted(length_edges := np.array(LENGTH_BUCKETS), np.sort(length), side="right") - 1
    counts = np.bincount(edges, minlength=len(length_edges))
    figures: dict[str, Any] = {
        "rows": rows,
        "users": int(present.sum()),
        "cold_users": int((present & ~trained_users).sum()),
        "rows_of_cold_users": int((~trained_users[columns["user"]]).sum()),
        "targets": int(_present(columns["target"], len(trained_items)).sum()),
        "rows_with_unseen_target": int((~trained_items[columns["target"]]).sum()),
        "rows_with_target_never_trained": int((~as_target[columns["target"]]).sum()),
        "repeat_targets": int(columns["repeats"].sum()),
        "hit_cap_under_mask": float(1 - columns["repeats"].mean()),
        "duplicate_rows": rows - _row_keys(columns, "time" in columns).n_unique(),
        "history_length": {
            "mean": float(length.mean()),
            "median": float(np.median(length)),
            "max": int(length.max()),
            "histogram": {_bucket_name(at): int(count) for at, count in enumerate(counts) if count},
        },
    }
    if "time" in columns:
        figures["first_target"], figures["last_target"] = (_date(f(columns["time"])) for f in (np.min, np.max))
    if "time" in columns and "newest" in columns:
        figures["target_tied_with_history"] = int((columns["newest"] == columns["time"]).sum())
    return figures


def _bucket_name(at: int) -> str:
    low = LENGTH_BUCKETS[at]
    if at + 1 == len(LENGTH_BUCKETS):
        return f"{low}+"
    high = LENGTH_BUCKETS[at + 1] - 1
    return str(low) if low == high else f"{low}-{high}"


def _row_keys(columns: _Columns, timed: bool) -> pl.DataFrame:
    """What tells two rows apart: user, target and the time, or the history where there are no times."""
    third = columns["time"] if timed else columns["history_hash"]
    return pl.DataFrame({"user": columns["user"], "target": columns["target"], "third": third})


def _catalogue_figures(items: Dataset, trained_items: np.ndarray, as_target: np.ndarray) -> dict[str, Any]:
    text = [name for name in items.column_names if name != "item_id"]
    frame = items.select_columns(text).to_polars()
    return {
        "items": frame.height,
        "never_in_train": int((~trained_items).sum()),
        "never_a_train_target": int((~as_target).sum()),
        "same_text_as_another": int(frame.is_duplicated().sum()),
        "empty_fields": {name: int(frame[name].null_count()) for name in text},
        "mean_words": {name: _mean_words(frame[name]) for name in text},
    }


def _mean_words(text: pl.Series) -> float:
    words = text.cast(pl.String).fill_null("").str.count_matches(r"\S+").to_numpy()
    return round(float(words.mean()), 1)


def _leakage(columns: Mapping[str, _Columns], split_rule: str | None) -> dict[str, int]:
    every = list(columns.values())
    found = {}
    if both := [part for part in every if "newest" in part and "time" in part]:
        found["history_after_target"] = sum(int((part["newest"] > part["time"]).sum()) for part in both)
    if ordered := [part for part in every if "unordered" in part]:
        found["history_out_of_order"] = sum(int(part["unordered"].sum()) for part in ordered)
    timed = all("time" in part for part in every)
    keys = pl.concat([_row_keys(part, timed).unique() for part in every])
    found["row_in_two_splits"] = keys.height - keys.n_unique()
    if timed:
        found["train_after_held_out"] = _train_after_held_out(columns)
        if split_rule in ("time_ratio", "time_cut"):
            found["splits_overlap_in_time"] = _overlap(columns["train"], columns["validation"]) + _overlap(
                columns["validation"], columns["test"]
            )
    return found


def _train_after_held_out(columns: Mapping[str, _Columns]) -> int:
    users = 1 + max(int(part["user"].max()) for part in columns.values())
    first = np.full(users, np.iinfo(np.int64).max)
    for split in ("validation", "test"):
        np.minimum.at(first, columns[split]["user"], columns[split]["time"])
    return int((columns["train"]["time"] > first[columns["train"]["user"]]).sum())


def _overlap(earlier: _Columns, later: _Columns) -> int:
    return int((earlier["time"] > later["time"].min()).sum())


def _notes(columns: Mapping[str, _Columns], split_rule: str | None) -> dict[str, Any]:
    """Figures that a reader should know and that are no leakage within a user."""
    notes: dict[str, Any] = {}
    train, test = columns["train"], columns["test"]
    if "time" in train and "time" in test:
        if split_rule == "leave_one_out":
            notes["train_targets_later_than_the_first_test_target"] = _overlap(train, test)
        edges = [(columns[a]["time"].max(), columns[b]["time"].min()) for a, b in zip(SPLITS, SPLITS[1:])]
        notes["split_boundaries_that_share_a_second"] = int(sum(a == b for a, b in edges))
    pairs = pl.DataFrame({"user": train["user"], "last": train["last"], "target": train["target"]}).unique()
    mine = pl.DataFrame({"user": test["user"], "last": test["last"], "target": test["target"]})
    notes["test_rows_whose_last_step_is_a_train_row_of_the_user"] = mine.join(
        pairs, on=pairs.columns, how="semi"
    ).height
    return notes


def _date(seconds: np.int64) -> str:
    return f"{datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc):%Y-%m-%d}"
