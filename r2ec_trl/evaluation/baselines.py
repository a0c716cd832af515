"""Baselines that only count: popularity, and item-to-item counts. A recommender worth its training beats both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r2ec_trl.errors import UserError

Rows = Any  # a `datasets.Dataset`, or anything else with the columns "history" and "target"


@dataclass(frozen=True)
class Transitions:
    """Weighted counts of (earlier item, later item), by rows of the earlier one (compressed sparse rows).

    Attributes:
        starts (`numpy.ndarray` of shape `(N + 1,)`):
            The pairs of item `i` are those from `starts[i]` to `starts[i + 1]`.
        later (`numpy.ndarray` of shape `(pairs,)`):
            The later item of each pair.
        weights (`numpy.ndarray` of shape `(pairs,)`):
            The weighted count of each pair.
    """

    starts: NDArray[np.int64]
    later: NDArray[np.int64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class CountingBaseline:
    """Ranks items by their transitions from the history, if there are any, then by popularity.

    Attributes:
        index (`Mapping[str, int]`):
            Position of each item id in the catalogue.
        popularity (`numpy.ndarray` of shape `(N,)`):
            How often each item is the target of a train row.
        transitions ([`Transitions`], *optional*):
            Absent for the popularity baseline.
        max_history_items (`int`):
            Only so many of the newest history items vote.
    """

    index: Mapping[str, int]
    popularity: NDArray[np.int64]
    transitions: Transitions | None
    max_history_items: int

    def ranks(self, dataset: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """1-based ranks over the whole catalogue; ties count against the target.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: the rank of each row's target, and its rank with the history masked
            (N + 1, a miss, if the target is a history item itself).
        """
        pairs = [self._ranks(*row) for row in _positions(dataset, self.index)]
        rank, rank_masked = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return rank, rank_masked

    def _ranks(self, history: list[int], target: int) -> tuple[int, int]:
        votes = self._votes(history[-self.max_history_items :])
        better = votes > votes[target]
        tied = (votes == votes[target]) & (self.popularity >= self.popularity[target])
        not_worse = better | tied  # (N,), the target itself among them
        rank = int(not_worse.sum())
        if target in history:
            return rank, len(not_worse) + 1
        not_worse[history] = False
        return rank, int(not_worse.sum())

    def _votes(self, history: list[int]) -> NDArray[np.float64]:
        votes = np.zeros(len(self.popularity))
        if self.transitions is None:
            return votes
        for distance, item in enumerate(reversed(history), start=1):
            pairs = slice(self.transitions.starts[item], self.transitions.starts[item + 1])
            votes[self.transitions.later[pairs]] += self.transitions.weights[pairs] / distance
        return votes.round(9)  # equal sums stay equal whatever the order of their terms


def popularity(train: Rows, item_ids: Sequence[str]) -> CountingBaseline:
    """Everyone gets the items that are most often the target of a train row.

    Args:
        train (`datasets.Dataset`):
            Rows with "history" and "target".
        item_ids (`Sequence[str]`):
            The catalogue.
    """
    index = {item_id: position for position, item_id in enumerate(item_ids)}
    return CountingBaseline(index, _popularity(train, index), transitions=None, max_history_items=0)


def item_to_item(train: Rows, item_ids: Sequence[str], max_history_items: int = 20) -> CountingBaseline:
    r"""Items that followed the user's history items in the train rows; ties are broken by popularity.

    Near items say more than far ones: with \\( \delta \\) the number of steps from a history item to the target, every
    history item of a train row adds \\( 1/\delta \\) to the count of (item, target), and a candidate's score is the
    sum of its counts from the user's history items, each over \\( \delta \\) again. Nothing is fitted.

    Args:
        train (`datasets.Dataset`):
            Rows with "history", oldest first, and "target".
        item_ids (`Sequence[str]`):
            The catalogue.
        max_history_items (`int`, *optional*, defaults to `20`):
            Only so many of the newest history items count, as in the user prompt.

    Example:

    In the one train row, b is one step before c and a is two. A user with history (a) scores c 1/2, all others 0: a, b
    and d tie with the same popularity, so the target d has rank 4, and 3 with a masked.

    ```python
    >>> baseline = item_to_item({"history": [["a", "b"]], "target": ["c"]}, ["a", "b", "c", "d"])
    >>> rank, rank_masked = baseline.ranks({"history": [["a"], ["a"]], "target": ["c", "d"]})
    >>> rank.tolist(), rank_masked.tolist()
    ([1, 4], [1, 3])

    ```
    """
    if max_history_items < 1:
        raise UserError(f"max_history_items is {max_history_items}; item-to-item counts need at least 1.")
    index = {item_id: position for position, item_id in enumerate(item_ids)}
    earlier: list[int] = []
    later: list[int] = []
    distances: list[int] = []
    for history, target in _positions(train, index):
        history = history[-max_history_items:]
        earlier += history
        later += [target] * len(history)
        distances += range(len(history), 0, -1)
    pairs = np.array(earlier, dtype=np.int64) * len(index) + np.array(later, dtype=np.int64)
    distinct, inverse = np.unique(pairs, return_inverse=True)
    transitions = Transitions(
        starts=np.searchsorted(distinct, np.arange(len(index) + 1) * len(index)),
        later=distinct % len(index),
        weights=np.bincount(inverse, weights=1.0 / np.array(distances, dtype=np.float64)).astype(np.float64),
    )
    return CountingBaseline(index, _popularity(train, index), transitions, max_history_items)


def _popularity(train: Rows, index: Mapping[str, int]) -> NDArray[np.int64]:
    return np.bincount([target for _, target in _positions(train, index)], minlength=len(index))


def _positions(dataset: Rows, index: Mapping[str, int]) -> list[tuple[list[int], int]]:
    """History and target of each row as positions in the catalogue."""
    try:
        return [
            ([index[item_id] for item_id in history], index[target])
            for history, target in zip(dataset["history"], dataset["target"], strict=True)
        ]
    except KeyError as error:
        raise UserError(
            f"Item {error} of a history or target is not in the catalogue; prepare the data anew."
        ) from error
