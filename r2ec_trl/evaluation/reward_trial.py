"""What rewards would make of rollouts that are kept in a file: without a model, in seconds."""

import asyncio
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import read_frame
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.rewards import OF_REWARDS, Reward, checked_reward, fused_reward

_NEEDED = ("row", "user_id", "target", "rank", "target_prob", "target_score", "top_item_ids", "completion", "prompt")
_RENAMED = {"rank": "target_rank"}  # as rewards call it
# what the file holds for people, and no reward gets in training
_NOT_GIVEN = {"row", "completion", "rank_masked", "logprob", "reasoning", "reasoning_tokens", "has_marker"}
_NOT_GIVEN |= {"log_likelihood"}
NO_SIGNAL = 1e-6  # equal rollouts differ by as much in float32; nearer rewards give every rollout an advantage of zero
SHOWN = 3


def rollout_rows(samples: pl.DataFrame, users: Dataset, prompts: Prompts, num_items: int) -> pl.DataFrame:
    """
    Samples of [`~r2ec_trl.evaluation.sampling.sample_users`] with all that a reward may ask for: every column of the
    users' rows but those that training leaves out, the `prompt` as messages, and `num_items`.
    """
    more = users.with_format(None).to_polars().drop("user_id", "target", *OF_REWARDS, "prompt", strict=False)
    if clash := sorted(set(more.columns) & set(samples.columns)):
        raise UserError(f"The dataset's column {clash[0]!r} bears a name that rollouts use; rename it to try rewards.")
    messages = pl.Series("prompt", [prompts.user_messages(user) for user in users])
    more = more.with_columns(messages, num_items=pl.lit(num_items))
    return pl.concat([samples, more[samples["row"].to_list()]], how="horizontal")


def read_rollouts(file: str | os.PathLike) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Rollouts that [`~r2ec_trl.evaluation.report.write_frame`] wrote, and their protocol."""
    fault = f"{file} is no file of rollouts; sample them again with recipes/try_reward.py."
    frame, protocol = read_frame(file, fault)
    missing = [name for name in _NEEDED if name not in frame.columns]
    if missing or not frame.height or not isinstance(protocol, dict):
        what = f"lacks the columns {', '.join(missing)}" if missing else "holds no rollouts"
        raise UserError(f"{file} {what}; sample them again with recipes/try_reward.py.")
    settings = protocol.get("settings")
    limit = settings.get("max_completion_length") if isinstance(settings, dict) else None
    if isinstance(limit, bool) or not isinstance(limit, int):  # soft_overlong is told it
        raise UserError(f"{file} has no `max_completion_length` in its protocol; sample the rollouts again.")
    return frame, protocol


def rewards_of(rollouts: pl.DataFrame, func: Reward) -> np.ndarray:
    """One reward a rollout of [`rollout_rows`], NaN where it does not apply; called as in training, all at once."""
    columns = {name: rollouts[name].to_list() for name in rollouts.columns if name not in _NOT_GIVEN}
    columns = {_RENAMED.get(name, name): values for name, values in columns.items()}
    texts = [[{"role": "assistant", "content": text}] for text in rollouts["completion"]]
    prompts = columns.pop("prompt")
    given = checked_reward(func)(completions=texts, prompts=prompts, **columns)
    found = asyncio.run(given) if inspect.iscoroutine(given) else given
    return np.array([math.nan if value is None else value for value in found], dtype=np.float64)


def try_rewards(rollouts: pl.DataFrame, rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """
    What each reward would teach, on the same rollouts.

    Args:
        rollouts (`polars.DataFrame`):
            From [`rollout_rows`]; rows with the same `row` are one user's group.
        rewards (`Mapping[str, Callable]`):
            Name → TRL reward callable.

    Returns:
        `dict`: name → `mean`; `spread` (mean standard deviation within groups); `without_signal` (share of groups
        whose rewards are all equal); `not_applicable` (share of rollouts); Spearman correlations `with_fused` (the
        paper's reward, M3) and `with_rank` (1: the better the rank, the higher the reward), `None` where one side
        never changes; `up` and `down`: the rollouts farthest above and below their group's mean.
    """
    fused = np.array(fused_reward([], rollouts["rank"].to_list(), rollouts["target_prob"].to_list()))
    return {name: _tried(rollouts, rewards_of(rollouts, func), fused) for name, func in rewards.items()}


def _tried(rollouts: pl.DataFrame, values: np.ndarray, fused: np.ndarray) -> dict[str, Any]:
    frame = rollouts.select("row", "rank").with_columns(
        reward=pl.Series(values).fill_nan(None), fused=pl.Series(fused)
    )
    reward = pl.col("reward")
    groups = frame.group_by("row", maintain_order=True).agg(
        spread=reward.std(ddof=1), width=reward.max() - reward.min()
    )
    frame = frame.with_columns(advantage=reward - reward.mean().over("row")).with_row_index("place")
    known = frame.drop_nulls("reward")
    order = known.filter(pl.col("advantage").abs() > NO_SIGNAL).sort("advantage", "place", descending=[True, False])
    shown = pl.concat(
        [rollouts.select("user_id", "completion"), frame.drop("row", "fused", "place")], how="horizontal"
    )

    def farthest(ordered: pl.DataFrame) -> list[dict[str, Any]]:  # of one user once
        places = ordered.unique("row", keep="first", maintain_order=True)["place"][:SHOWN].to_list()
        return shown[places].rows(named=True)

    return {
        "mean": known["reward"].mean(),
        "spread": groups.drop_nulls("width")["spread"].fill_null(0.0).mean(),
        "without_signal": 1 - groups.filter(pl.col("width") > NO_SIGNAL).height / groups.height,
        "not_applicable": 1 - known.height / frame.height,
        "with_fused": _spearman(known["reward"], known["fused"]),
        "with_rank": _spearman(known["reward"], -known["rank"]),
        "up": farthest(order),
        "down": farthest(order.reverse()),
    }


def _spearman(one: pl.Series, other: pl.Series) -> float | None:
    if one.n_unique() < 2 or other.n_unique() < 2:
        return None
    return pl.DataFrame({"one": one, "other": other}).select(pl.corr("one", "other", method="spearman")).item()
