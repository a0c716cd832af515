"""Recommendation metrics of 1-based ranks with one relevant item, and bootstrap intervals of their means.

Everything is numpy in float64.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r2ec_trl.errors import UserError

Values = NDArray[np.float64]
CUTOFFS = (5, 10, 20)
KINDS = ("hit", "ndcg", "mrr")
LEVEL, RESAMPLES = 0.95, 10_000  # of every interval; sentences that state them read them here
PERCENT = f"{100 * LEVEL:g} %"
_DRAWN_AT_ONCE = 2**22  # counts: 32 MB however many rows there are


def hit_at_k(ranks: ArrayLike, k: int) -> Values:
    """1 where the rank is at most k, else 0: `hit_at_k([1, 3, 11], 10)` is `[1, 1, 0]`.

    Args:
        ranks (array-like of `int`):
            1-based ranks of the targets.
        k (`int`):
            Cutoff. It may exceed the number of items.
    """
    return (_ranks(ranks) <= _cutoff(k)).astype(np.float64)


def ndcg_at_k(ranks: ArrayLike, k: int) -> Values:
    r"""NDCG@k with one relevant item (M1): \\( 1/\log_2(\text{rank}+1) \\) where the rank is at most k, else 0.

    `ndcg_at_k([1, 3, 11], 10)` is `[1, 0.5, 0]`; arguments as in [`hit_at_k`].
    """
    ranks = _ranks(ranks)
    return np.where(ranks <= _cutoff(k), 1.0 / np.log2(ranks + 1.0), 0.0)


def reciprocal_rank(ranks: ArrayLike, k: int | None = None) -> Values:
    """1/rank, and 0 beyond the cutoff if there is one: `reciprocal_rank([1, 4, 11], 10)` is `[1, 0.25, 0]`.

    Arguments as in [`hit_at_k`]; without a cutoff every rank counts.
    """
    ranks = _ranks(ranks)
    return 1.0 / ranks if k is None else np.where(ranks <= _cutoff(k), 1.0 / ranks, 0.0)


def metric_values(ranks: ArrayLike, ks: Sequence[int] = CUTOFFS, kinds: Sequence[str] = KINDS) -> dict[str, Values]:
    """Every metric of every row: `{"hit@5": ..., "ndcg@5": ..., "mrr@5": ..., "hit@10": ...}`."""
    functions = {"hit": hit_at_k, "ndcg": ndcg_at_k, "mrr": reciprocal_rank}
    return {f"{name}@{k}": functions[name](ranks, k) for k in ks for name in kinds}


def summarise_ranks(ranks: ArrayLike, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """The mean of every metric: `summarise_ranks([1, 3], ks=[2])` is `{"hit@2": 0.5, "ndcg@2": 0.5, "mrr@2": 0.5}`."""
    if _ranks(ranks).size == 0:
        raise UserError("There are no ranks to summarise: the split has no rows.")
    return {name: float(values.mean()) for name, values in metric_values(ranks, ks).items()}


def bootstrap_interval(
    values: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values (array-like of `float`):
            One value per row.
        level (`float`, *optional*, defaults to `0.95`):
            Share of the resampled means inside the interval.
        resamples (`int`, *optional*, defaults to `10000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        groups (array-like, *optional*):
            Such as the user of each row: the rows of a group, which resemble each other, are drawn together. By
            default each row is drawn by itself.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise UserError("A bootstrap interval needs one finite value per row and at least one row.")
    if not 0 < level < 1 or resamples < 1:
        raise UserError(
            f"level is {level} and resamples {resamples}; level lies in (0, 1) and resamples is at least 1."
        )
    means = np.concatenate(list(_resampled_means(values, groups, resamples, seed)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    after: ArrayLike,
    before: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> dict[str, float]:
    """Mean difference of two measurements of the same rows, with its interval: both sides of a row are drawn together.

    Where a side was measured by several runs (seeds), they are drawn, too, independently of the rows: of S runs S - 1
    at a time, so that the variance between few runs is not underestimated by (S - 1) / S (Rao and Wu, 1988). What rows
    and runs do together is counted with both: such intervals are rather too wide. A single run is taken as it is: the
    interval then is that of the rows alone.

    Args:
        after (array-like of `float`):
            One value per row, `(rows,)`, or that of several runs, `(runs, rows)`.
        before (array-like of `float`):
            The value it is compared with, row by row, of one run or several.
        level, resamples, seed, groups:
            As in [`bootstrap_interval`].

    Returns:
        `dict[str, float]`: "difference" (after - before), "low" and "high".
    """
    runs = [np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (after, before)]
    if runs[0].shape[1:] != runs[1].shape[1:] or 0 in (*runs[0].shape, *runs[1].shape):
        raise UserError(
            f"A paired comparison needs the same rows on both sides, got {np.shape(after)} and {np.shape(before)}."
        )
    difference = float(runs[0].mean() - runs[1].mean())
    if len(runs[0]) == len(runs[1]) == 1:
        low, high = bootstrap_interval(runs[0][0] - runs[1][0], level, resamples, seed, groups)
        return {"difference": difference, "low": low, "high": high}
    drawn = np.concatenate(list(_resampled_means(np.concatenate(runs), groups, resamples, seed)))  # (resamples, runs)
    generator = np.random.default_rng([seed, 1])
    sides = []
    for start, count in ((0, len(runs[0])), (len(runs[0]), len(runs[1]))):
        times = max(1, count - 1)
        weights = generator.multinomial(times, np.full(count, 1 / count), size=resamples) / times
        sides.append((drawn[:, start : start + count] * weights).sum(axis=1))
    low, high = np.quantile(sides[0] - sides[1], [(1 - level) / 2, (1 + level) / 2])
    return {"difference": difference, "low": float(low), "high": float(high)}


def sign_flip_p(
    differences: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, groups: ArrayLike | None = None
) -> float:
    """Two-sided p of the mean difference, by flipping the sign of each group's rows at random: the chance to see one
    at least as far from 0 if neither side were better. A run and itself: p is 1.

    Args:
        differences (array-like of `float`):
            One per row; where there are several runs, the difference of their means.
        resamples, seed, groups:
            As in [`bootstrap_interval`].
    """
    sums = np.asarray(differences, dtype=np.float64)
    if groups is not None:
        sums = np.bincount(np.unique(np.asarray(groups), return_inverse=True)[1], sums).astype(np.float64)
    # n signs of one size add up to 2 Binomial(n, 1/2) - n
    distinct, counts = np.unique(np.abs(sums), return_counts=True)
    generator = np.random.default_rng(seed)
    far = 0
    step = max(1, _DRAWN_AT_ONCE // counts.size)
    for done in range(0, resamples, step):
        signs = 2 * generator.binomial(counts, 0.5, size=(min(step, resamples - done), counts.size)) - counts
        far += int((np.abs(signs @ distinct) >= abs(sums.sum()) - 1e-9).sum())
    return (far + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, corrected by Holm's step-down: the smallest of m times m, the next times m - 1.

    ```python
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    ```
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, test in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[test]))
        corrected[test] = highest
    return corrected


def _ranks(ranks: ArrayLike) -> Values:
    ranks = np.asarray(ranks, dtype=np.float64)
    if not (ranks >= 1).all():
        raise ValueError("ranks are 1-based: each must be at least 1.")
    return ranks


def _cutoff(k: int) -> int:
    if k < 1:
        raise UserError(f"The cutoff is {k}; it must be at least 1.")
    return k


def _resampled_means(values: Values, groups: ArrayLike | None, resamples: int, seed: int) -> Iterator[Values]:
    """Means of resamples, some at a time; of several measurements of the rows, `(runs, rows)`, a column each.

    All that matters of a group is its sum and its size. How often each distinct pair of them is drawn is multinomial,
    and metrics have few distinct pairs.
    """
    sums, sizes = np.atleast_2d(values), np.ones(values.shape[-1])
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        sums = np.stack([np.bincount(group, run) for run in sums])
        sizes = np.bincount(group).astype(np.float64)
    distinct, counts = np.unique(np.vstack([sums, sizes]), axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // counts.size)
    for done in range(0, resamples, step):
        drawn = generator.multinomial(sizes.size, counts / sizes.size, size=min(step, resamples - done))
        means = (drawn @ distinct[:-1].T) / (drawn @ distinct[-1])[:, None]
        yield means[:, 0] if values.ndim == 1 else means
