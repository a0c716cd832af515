"""Evaluations of the same rows compared: paired differences with intervals, permutation tests, seeds as a factor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import MASKS, flat
from r2ec_trl.metrics import CUTOFFS, KINDS, holm, metric_values, paired_bootstrap, sign_flip_p

# What two results may differ in and still be compared: it is what a comparison is about.
_FREE = ("seed", "settings", "versions")


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], names: str = "The results"
) -> dict[str, tuple[Any, Any]]:
    """What two protocols differ in: dotted key -> both values. A [`UserError`] if they cannot be compared.

    They cannot if they differ in anything but seed, settings and versions: split, catalogue, ties, mask.
    """
    one, other = flat(before), flat(after)
    found = {key: (one.get(key), other.get(key)) for key in sorted({*one, *other}) if one.get(key) != other.get(key)}
    for key, values in found.items():
        if key.split(".")[0] not in _FREE:
            raise UserError(
                f"{names} cannot be compared: their protocols differ in {key} ({values[0]!r} and {values[1]!r}); "
                "evaluate both on the same dataset folder and split."
            )
    return found


def check_rows(before: pl.DataFrame, after: pl.DataFrame, names: str = "The results") -> None:
    """[`UserError`] unless both frames are of the same users and targets in the same order."""
    if before.height != after.height or not before.select("user_id", "target").equals(
        after.select("user_id", "target")
    ):
        raise UserError(
            f"{names} cannot be compared: they are not of the same users and targets ({before.height} and "
            f"{after.height} rows); evaluate both on the same rows."
        )


def compare_runs(
    before: Sequence[pl.DataFrame],
    after: Mapping[str, Sequence[pl.DataFrame]],
    metrics: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Paired differences of systems from one reference, each measured by one run or several (seeds), on the same rows.

    The interval is of users and, where a side has several runs, of these, too
    ([`~r2ec_trl.metrics.paired_bootstrap`]). p is of users alone, for the runs as they are
    ([`~r2ec_trl.metrics.sign_flip_p`]); `p_holm` is corrected for the family of all systems, masks and metrics asked
    for.

    Args:
        before (`Sequence[polars.DataFrame]`):
            Runs of the reference.
        after (`Mapping[str, Sequence[polars.DataFrame]]`):
            Runs of each system.
        metrics (`Sequence[str]`):
            Such as `"ndcg@10"`, `"hit@5"`, `"mrr@20"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all draws.

    Returns:
        `dict`: `rows`, `users`, `runs` (how many, by name), and under `systems`: name -> mask -> metric -> `before`,
        `after`, `difference`, `low`, `high`, `p`, `p_holm`.
    """
    for frame in [*before, *(one for runs in after.values() for one in runs)]:
        check_rows(before[0], frame)
    users = before[0]["user_id"].to_numpy()
    systems: dict[str, Any] = {}
    for name, runs in after.items():
        systems[name] = {}
        for mask, column in MASKS.items():
            old, new = ([_values(frame[column], metrics) for frame in side] for side in (before, runs))
            systems[name][mask] = {
                metric: _difference(
                    np.stack([run[metric] for run in old]), np.stack([run[metric] for run in new]), users, seed
                )
                for metric in metrics
            }
    family = [figure for of in systems.values() for masked in of.values() for figure in masked.values()]
    for figure, p in zip(family, holm([figure["p"] for figure in family]), strict=True):
        figure["p_holm"] = p
    runs_of = {"before": len(before), **{name: len(runs) for name, runs in after.items()}}
    return {
        "rows": before[0].height,
        "users": before[0]["user_id"].n_unique(),
        "runs": runs_of,
        "family": len(family),
        "systems": systems,
    }


def compare_frames(
    before: pl.DataFrame, after: pl.DataFrame, ks: Sequence[int] = CUTOFFS, seed: int = 0
) -> dict[str, Any]:
    """[`compare_runs`] of two runs, in every metric: `rows`, `users`, and under `unmasked` and `masked`: metric ->
    `before`, `after`, `difference`, `low`, `high`, `p`, `p_holm`."""
    found = compare_runs([before], {"after": [after]}, [f"{kind}@{k}" for k in ks for kind in KINDS], seed)
    return {"rows": found["rows"], "users": found["users"], **found["systems"]["after"]}


def _difference(before: np.ndarray, after: np.ndarray, users: np.ndarray, seed: int) -> dict[str, float]:
    """Of one metric of the runs, `(runs, rows)`."""
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        **paired_bootstrap(after, before, seed=seed, groups=users),
        "p": sign_flip_p(after.mean(axis=0) - before.mean(axis=0), seed=seed, groups=users),
    }


def _values(ranks: pl.Series, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    found = {}
    for metric in metrics:
        kind, _, k = metric.partition("@")
        if kind not in KINDS or not (k.isascii() and k.isdigit()):
            raise UserError(f"`{metric}` is no metric; give {', '.join(KINDS)} with a cutoff, such as ndcg@10.")
        (found[metric],) = metric_values(ranks.to_numpy(), (int(k),), (kind,)).values()
    return found
