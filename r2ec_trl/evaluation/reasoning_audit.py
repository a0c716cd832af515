"""Does thinking pay? One checkpoint under several ways to reason, with what each costs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import MASKS
from r2ec_trl.evaluation.users import REASONING_MODES
from r2ec_trl.metrics import bootstrap_interval, ndcg_at_k, paired_bootstrap

COUNTED_MODES = {"first": "the first n tokens, then the marker", "best": "of n sampled ones the likeliest"}
CUTOFF = 10


def split_mode(mode: str) -> tuple[str, int]:
    """`("first", 8)` of `"first:8"`, `("full", 0)` of `"full"`; [`UserError`] for what is no mode."""
    name, colon, number = mode.partition(":")
    if not colon and name in REASONING_MODES:
        return name, 0
    if name in COUNTED_MODES and number.isascii() and number.isdigit() and int(number) > 0:
        return name, int(number)
    known = ", ".join([*REASONING_MODES, *(f"{name}:N" for name in COUNTED_MODES)])
    raise UserError(f"`reasoning` is {mode!r}; give one or more of {known}, N from 1 up.")


def audit_modes(max_completion_length: int) -> list[str]:
    """Modes of an audit: none, the first 4, 8, 16 … tokens, all, another user's, the likeliest of 8."""
    lengths = [2**power for power in range(2, 20) if 2**power < max_completion_length]
    return ["none", *(f"first:{length}" for length in lengths), "full", "other", "best:8"]


def audit_reasoning(
    frames: Mapping[str, pl.DataFrame],
    seconds: Mapping[str, float],
    samples: Mapping[str, pl.DataFrame],
    beside: Mapping[str, pl.DataFrame],
    seed: int = 0,
) -> dict[str, Any]:
    """
    NDCG@10, tokens and seconds a user of every way to reason, and paired differences.

    Args:
        frames (`Mapping[str, polars.DataFrame]`):
            Mode → frame of [`~r2ec_trl.evaluation.users.evaluate_users`], the same users in the same order.
        seconds (`Mapping[str, float]`):
            Mode → seconds a user that reasoning and ranking took.
        samples (`Mapping[str, polars.DataFrame]`):
            Mode `best:N` → one row a user: the ranks of all N samples, lists `rank` and `rank_masked`, and
            `reasoning_tokens`, of all of them together.
        beside (`Mapping[str, polars.DataFrame]`):
            Name → frame of another model on the same users: what the same time buys without reasoning, say.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict`: mode or name → `tokens`, `seconds`, `missing_marker`, and under `unmasked` and `masked`: `value`,
        `low`, `high` of NDCG@10, and `difference`, `low`, `high` of `minus_none` and `minus_full` where these were
        evaluated; of `best:N` also `minus_mean`, and `mean` and `oracle` (the best rank among N; no policy knows it).
    """
    result: dict[str, Any] = {}
    for name, frame in {**frames, **beside}.items():
        one: dict[str, Any] = {"tokens": 0.0, "missing_marker": None, "seconds": seconds.get(name)}
        if "reasoning_tokens" in frame.columns:  # a baseline's have none
            one["tokens"] = float(samples.get(name, frame)["reasoning_tokens"].to_numpy().mean())
            one["missing_marker"] = 1 - float(frame["has_marker"].cast(pl.Float64).to_numpy().mean())
        for mask, column in MASKS.items():
            one[mask] = _figures(frame, frames, samples.get(name), column, seed)
        result[name] = one
    return result


def _figures(
    frame: pl.DataFrame, frames: Mapping[str, pl.DataFrame], samples: pl.DataFrame | None, column: str, seed: int
) -> dict[str, Any]:
    users, values = frame["user_id"].to_numpy(), ndcg_at_k(frame[column].to_numpy(), CUTOFF)
    low, high = bootstrap_interval(values, seed=seed, groups=users)
    found: dict[str, Any] = {"value": float(values.mean()), "low": low, "high": high}
    for other in ("none", "full"):
        if other in frames and frames[other] is not frame:
            against = ndcg_at_k(frames[other][column].to_numpy(), CUTOFF)
            found[f"minus_{other}"] = paired_bootstrap(values, against, seed=seed, groups=users)
    if samples is not None:
        every = np.array([ndcg_at_k(ranks, CUTOFF) for ranks in samples[column].to_list()])  # (users, N)
        mean = every.mean(axis=1)
        found |= {"mean": float(mean.mean()), "oracle": float(every.max(axis=1).mean())}
        found["minus_mean"] = paired_bootstrap(values, mean, seed=seed, groups=users)
    return found
