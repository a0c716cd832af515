"""Baselines on the rows, the catalogue and the mask of the model: counts, and whatever gives every item a score.

A recommender worth its training beats popularity and item-to-item counts, which are in every report.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.slices import TOP

Rows = Any  # a `datasets.Dataset`, or anything else with the columns "history" and "target"
Positions: TypeAlias = tuple[list[int], int]  # history and target as rows of the catalogue
Answer: TypeAlias = tuple[int, int, list[int]]  # rank, rank with the history masked, the best items (not masked)


class Baseline(Protocol):
    """What ranks the catalogue for users given by their histories."""

    @property
    def index(self) -> Mapping[str, int]:
        """Position of each item id in the catalogue."""

    def answers(self, rows: Iterable[Positions]) -> Iterator[Answer]:
        """Rank of each row's target, not masked and masked (N + 1 for a repeat), ties against it, and the top 10."""


def baseline_frame(baseline: Baseline, dataset: Rows) -> pl.DataFrame:
    """
    A row an example as [`~r2ec_trl.evaluation.users.evaluate_users`] makes them: `user_id`, `target`, `rank`,
    `rank_masked`, `top_item_ids`.
    """
    item_ids = list(baseline.index)
    rank, rank_masked, best = map(list, zip(*baseline.answers(positions(dataset, baseline.index)), strict=True))
    return pl.DataFrame(
        {
            "user_id": dataset["user_id"][:],
            "target": dataset["target"][:],
            "rank": rank,
            "rank_masked": rank_masked,
            "top_item_ids": [[item_ids[item] for item in items] for items in best],
        }
    )


@dataclass(frozen=True)
class ScoredBaseline:
    """
    Ranks items by the scores that a model gives them; ties count against the target.

    Attributes:
        index (`Mapping[str, int]`):
            Position of each item id in the catalogue.
        score (`Callable`):
            Histories as lists of positions -> scores, `(histories, N)`.
        batch_size (`int`):
            Histories scored together.
    """

    index: Mapping[str, int]
    score: Callable[[list[list[int]]], NDArray[Any]]
    batch_size: int = 256

    def answers(self, rows: Iterable[Positions]) -> Iterator[Answer]:
        """See [`Baseline`]."""
        every = iter(rows)
        while batch := list(islice(every, self.batch_size)):
            scores = self.score([history for history, _ in batch])
            if scores.shape != (len(batch), len(self.index)) or not np.isfinite(scores).all():
                raise ValueError(
                    f"Scores must be finite, one an item and history; got {scores.shape} of {len(batch)}."
                )
            best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
            for one, items, (history, target) in zip(scores, best, batch, strict=True):
                not_worse = one >= one[target]
                rank = int(not_worse.sum())
                not_worse[history] = False
                masked = len(one) + 1 if target in history else int(not_worse.sum())
                yield rank, masked, items.tolist()


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

    def answers(self, rows: Iterable[Positions]) -> Iterator[Answer]:
        """See [`Baseline`]."""
        for history, target in rows:
            votes = self._votes(history[-self.max_history_items :])
            yield (*self._ranks(votes, history, target), self._best(votes))

    @cached_property
    def _by_popularity(self) -> NDArray[np.int64]:
        return np.argsort(-self.popularity, kind="stable")

    def _best(self, votes: NDArray[np.float64]) -> list[int]:
        voted = np.flatnonzero(votes)
        first = voted[np.lexsort((-self.popularity[voted], -votes[voted]))][:TOP].tolist()
        others = (item for item in self._by_popularity.tolist() if not votes[item])
        return first + list(islice(others, TOP - len(first)))

    def _ranks(self, votes: NDArray[np.float64], history: list[int], target: int) -> tuple[int, int]:
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
    >>> [(rank, rank_masked) for rank, rank_masked, _ in baseline.answers([([0], 2), ([0], 3)])]
    [(1, 1), (4, 3)]

    ```
    """
    if max_history_items < 1:
        raise UserError(f"max_history_items is {max_history_items}; item-to-item counts need at least 1.")
    index = {item_id: position for position, item_id in enumerate(item_ids)}
    earlier: list[int] = []
    later: list[int] = []
    distances: list[int] = []
    for history, target in positions(train, index):
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
    return np.bincount([target for _, target in positions(train, index)], minlength=len(index))


def positions(dataset: Rows, index: Mapping[str, int]) -> list[tuple[list[int], int]]:
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
