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

    `ndcg_at_k([1, 3, 11], 10)` is `[1, 0.5, 0]`.

    Args:
        ranks (array-like of `int`):
            1-based ranks of the targets.
        k (`int`):
            Cutoff. It may exceed the number of items.
    """
    ranks = _ranks(ranks)
    return np.where(ranks <= _cutoff(k), 1.0 / np.log2(ranks + 1.0), 0.0)


def reciprocal_rank(ranks: ArrayLike, k: int | None = None) -> Values:
    """1/rank, and 0 beyond the cutoff if there is one: `reciprocal_rank([1, 4, 11], 10)` is `[1, 0.25, 0]`.

    Args:
        ranks (array-like of `int`):
            1-based ranks of the targets.
        k (`int`, *optional*):
            Cutoff. Without one every rank counts.
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

    Args:
        after (array-like of `float`):
            One value per row.
        before (array-like of `float`):
            The value it is compared with, row by row.
        level, resamples, seed, groups:
            As in [`bootstrap_interval`].

    Returns:
        `dict[str, float]`: "difference" (after - before), "low" and "high".
    """
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if after.shape != before.shape:
        raise UserError(
            f"A paired comparison needs the same rows on both sides, got {after.shape} and {before.shape}."
        )
    low, high = bootstrap_interval(after - before, level, resamples, seed, groups)
    return {"difference": float((after - before).mean()), "low": low, "high": high}


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
    """Means of resamples, some at a time.

    All that matters of a group is its sum and its size. How often each distinct pair of them is drawn is multinomial,
    and metrics have few distinct pairs.
    """
    sums, sizes = values, np.ones(values.size)
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        sums, sizes = (np.bincount(group, weights).astype(np.float64) for weights in (values, None))
    distinct, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // counts.size)
    for done in range(0, resamples, step):
        drawn = generator.multinomial(sums.size, counts / sums.size, size=min(step, resamples - done))
        yield (drawn @ distinct[0]) / (drawn @ distinct[1])
