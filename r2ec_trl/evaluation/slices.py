"""Where a recommender is right, and what it gives out: slices of the rows, and figures beyond accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from r2ec_trl.errors import UserError

TOP = 10  # items of a list that figures beyond accuracy look at
COLD = "cold"  # an item that is never a target of training
POPULARITY = ("tail", "middle", "head")
# name of a slice -> name of a bucket -> the rows in it, by the columns of `describe_rows`
SLICES: dict[str, dict[str, pl.Expr]] = {
    "targets": {
        COLD: pl.col("target_popularity") == COLD,
        "others": pl.col("target_popularity") != COLD,
    },
    "history": {
        "none": pl.col("history_items") == 0,
        "1": pl.col("history_items") == 1,
        "2": pl.col("history_items") == 2,
        "3-4": pl.col("history_items").is_between(3, 4),
        "5+": pl.col("history_items") >= 5,
    },
    "popularity": {name: pl.col("target_popularity") == name for name in POPULARITY},
}


def target_counts(train: Any, item_ids: Sequence[str]) -> dict[str, int]:
    """How often each item of the catalogue is the target of a train row.

    ```python
    >>> target_counts({"target": ["a", "c", "a"]}, ["a", "b", "c"])
    {'a': 2, 'b': 0, 'c': 1}

    ```
    """
    counts = dict.fromkeys(item_ids, 0)
    for target in train["target"]:
        if target not in counts:
            raise UserError(f"Item {target!r} of a target is not in the catalogue; prepare the data anew.")
        counts[target] += 1
    return counts


def popularity_of(counts: Mapping[str, int]) -> dict[str, str]:
    """
    `"cold"` for an item that is never a target, else the third of the train rows that it lies in, rarest items first:
    `"tail"`, `"middle"` or `"head"`. Items of the same count lie in the same third, that of the middle of their rows.

    Nine rows: two are of d and e (middle: 1), then two of c (middle: 3), then five of a (middle: 6.5).

    ```python
    >>> popularity_of({"a": 5, "b": 0, "c": 2, "d": 1, "e": 1})
    {'a': 'head', 'b': 'cold', 'c': 'middle', 'd': 'tail', 'e': 'tail'}

    ```
    """
    values = np.sort(np.array(list(counts.values()), dtype=np.int64))
    before = np.concatenate([[0], np.cumsum(values)])
    third = {}
    for count in set(values[values > 0].tolist()):
        first, behind = np.searchsorted(values, [count, count + 1])
        third[count] = POPULARITY[int(3 * (before[first] + before[behind]) / (2 * before[-1]))]
    return {item_id: third[count] if count else COLD for item_id, count in counts.items()}


def describe_rows(frame: pl.DataFrame, rows: Any, counts: Mapping[str, int]) -> pl.DataFrame:
    """
    The frame, one row per example, with what its slices are made by: `history_items` of the same `rows`, and
    `target_popularity` (see [`popularity_of`]) by the [`target_counts`].
    """
    names = popularity_of(counts)
    return frame.with_columns(
        history_items=pl.Series([len(history) for history in rows["history"]], dtype=pl.Int64),
        target_popularity=pl.Series([names[target] for target in frame["target"]], dtype=pl.String),
    )


def slices_of(frame: pl.DataFrame) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Slice -> bucket -> which rows are in it; nothing for a frame that [`describe_rows`] has not seen."""
    if not {"history_items", "target_popularity"} <= set(frame.columns):
        return {}
    return {
        name: {bucket: frame.select(rows).to_series().to_numpy() for bucket, rows in buckets.items()}
        for name, buckets in SLICES.items()
    }


def beyond_accuracy(lists: Sequence[Sequence[str]], counts: Mapping[str, int], k: int = TOP) -> dict[str, float]:
    """
    What all users get together.

    Args:
        lists (`Sequence[Sequence[str]]`):
            Each row's best items, best first.
        counts (`Mapping[str, int]`):
            See [`target_counts`]: the catalogue and how popular its items are.
        k (`int`, *optional*, defaults to `10`):
            Items of a list that count.

    Returns:
        `dict`: `coverage@k` (share of the catalogue that anybody gets), `gini@k` (0: all items as often, 1: one item
        takes all), `mean_popularity@k` (of what is given out: times an item is the target of a train row) and
        `top1_share` (rows that get the most frequent first item).

    Example:

    Two of four items are given out, three times and once: sorted 0, 0, 1, 3, Gini is 2 (3·1 + 4·3) / (4·4) - 5/4.

    ```python
    >>> beyond_accuracy([["a", "b"], ["a"], ["a"]], {"a": 4, "b": 2, "c": 0, "d": 1})
    {'coverage@10': 0.5, 'gini@10': 0.625, 'mean_popularity@10': 3.5, 'top1_share': 1.0}

    ```
    """
    given = dict.fromkeys(counts, 0)
    first: dict[str, int] = {}
    for row in lists:
        for item_id in row[:k]:
            given[item_id] += 1
        first[row[0]] = first.get(row[0], 0) + 1
    times = np.sort(np.array(list(given.values()), dtype=np.float64))
    places = np.arange(1, len(times) + 1)
    return {
        f"coverage@{k}": float((times > 0).mean()),
        f"gini@{k}": float(2 * (places @ times) / (len(times) * times.sum()) - (len(times) + 1) / len(times)),
        f"mean_popularity@{k}": sum(given[item_id] * counts[item_id] for item_id in given) / float(times.sum()),
        "top1_share": max(first.values()) / len(lists),
    }
