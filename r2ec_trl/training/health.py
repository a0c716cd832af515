"""Warnings that name the cure: what the logged figures of a run say about its health."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

VALIDATION_NDCG = "eval_recommendation/ndcg@10"
TOP1 = "eval_recommendation/top1_share"

# Health. Each threshold is compared with the mean of the last HEALTH_WINDOW logged values, once there are
# HEALTH_MINIMUM of them: a single batch of few users is too noisy to warn of.
HEALTH_WINDOW = 3
HEALTH_MINIMUM = 2
# Measured with the item term averaged over rows: item gradients of 3-22 against .17 dissolved the text.
GRADIENT_RATIO = 10.0
# Appended markers are not trained on: with a third of them, much of the reward is not the policy's doing.
MISSING_MARKER = 0.3
# A cut rollout never reached its conclusion; beyond half, the limit decides what is rewarded.
CLIPPED = 0.5
# Groups whose rewards are all equal have zero advantage: half of the rollouts are paid for and teach nothing.
ZERO_STD = 0.5
# An untrained language model's rows start near .98 and fall while they learn to differ; staying above .95, or rising
# by .2 from the start, can mean that the items collapse onto one direction. Seen with `item_negatives` catalogue and
# `item_coef` 20: the batch's 24 targets are pulled to their users, few of the 600 negatives are pushed; .80 to .96.
# The demo goes .01 to .5 and its validation rises all the while, so the sentence asks for a look at that.
COSINE = 0.95
COSINE_RISE = 0.2
COSINE_GRACE = 10  # logged values before a high, falling cosine counts as a collapse
# Mean log-rank that fresh target rows gain among stale ones: .5 is a rank 1.6 times better for no learning at all.
FRESH_RANK_GAIN = 0.5
# Mean |log-prob of the sampler - log-prob of the trainer| a token; bf16 noise of a merged adapter stays near .04.
SAMPLING_DIFFERENCE = 0.1
# One item first for a third of the users is a popularity list (34 % was seen in a collapsed run of a peer).
TOP1_SHARE = 0.3


def selection_figure(metric: str | None) -> tuple[str, str]:
    """The logged validation figure of the metric that chooses the best weights (NDCG@10), and its name in words."""
    metric = (metric or VALIDATION_NDCG).removeprefix("eval_")
    return f"eval_{metric}", "validation NDCG@10" + (", history masked" if "masked" in metric else "")


def finite_number(value: Any) -> float | None:
    """A logged value as a number, `None` where it is none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


class Rule(NamedTuple):
    """A warning: `metric` above `limit` on average; `warning` is formatted with the value."""

    metric: str
    limit: float
    warning: str


RULES = (
    Rule(
        "rollout/missing_marker",
        MISSING_MARKER,
        "{:.0%} of the rollouts never write the answer marker; raise --max_completion_length, lower --temperature "
        "or --learning_rate, or warm-start the policy on reasonings that end with the marker.",
    ),
    Rule(
        "completions/clipped_ratio",
        CLIPPED,
        "{:.0%} of the rollouts are cut at the length limit; raise --max_completion_length, lower --temperature, or "
        "set --mask_truncated_completions.",
    ),
    Rule(
        "frac_reward_zero_std",
        ZERO_STD,
        "{:.0%} of the groups have equal rewards and teach nothing; raise --num_generations or --temperature, or mix "
        "in a denser reward (--reward_funcs fused, a larger --reward_cutoff).",
    ),
    Rule(
        "table/fresh_rank_gain",
        FRESH_RANK_GAIN,
        "target rows gain {:.2f} in mean log-rank merely by being fresh among stale rows, so the reward flatters; "
        "raise --table_refresh_budget (1.0 re-encodes the whole table before each reward pass).",
    ),
    Rule(
        "sampling/sampling_logp_difference/mean",
        SAMPLING_DIFFERENCE,
        "the sampler's log-probs differ from the trainer's by {:.2f} a token, so it is not the policy being trained; "
        "use one dtype for both (--bf16) and check that the weights are synchronised.",
    ),
    Rule(
        TOP1,
        TOP1_SHARE,
        "one item is first for {:.0%} of the users; lower --learning_rate or --item_coef, or go back to an earlier "
        "checkpoint.",
    ),
)


class HealthCallback(TrainerCallback):
    """
    Watches the logged metrics and warns once for each cause, with the cure in the sentence. Thresholds and their
    reasons are the constants at the top of this file. Main process only; it never stops a run.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self._recent: dict[str, deque[float]] = {}
        self._cosines: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        for rule in RULES:
            mean = self._mean(rule.metric, logs.get(rule.metric))
            if mean is not None and mean > rule.limit:
                self._warn(rule.metric, rule.warning.format(mean), state)
        self._check_gradients(logs, state)
        self._check_cosine(logs, state, getattr(args, "item_negatives", None) == "catalogue")

    def _mean(self, name: str, value: Any) -> float | None:
        """Mean of the last few values with this one; `None` while there are too few, or where this log has none."""
        number = finite_number(value)
        if number is None:
            return None
        recent = self._recent.setdefault(name, deque(maxlen=HEALTH_WINDOW))
        recent.append(number)
        return sum(recent) / len(recent) if len(recent) >= HEALTH_MINIMUM else None

    def _check_gradients(self, logs: Mapping[str, Any], state) -> None:
        token, item = (self._mean(name, logs.get(name)) for name in ("grad_norm/token", "grad_norm/item"))
        if token and item and item > GRADIENT_RATIO * token:
            self._warn(
                "grad_norm/item",
                f"the item term's gradient ({item:.3g}) is {item / token:.0f} times the tokens' ({token:.3g}) and "
                "will dissolve the text; lower --item_coef, or use recipes/contrastive.py for the item head alone.",
                state,
            )

    def _check_cosine(self, logs: Mapping[str, Any], state, whole_catalogue: bool) -> None:
        number = finite_number(logs.get("item/mean_pairwise_cosine"))
        if number is None:
            return
        self._cosines.append(number)
        rise = number - self._cosines[0]
        stuck = len(self._cosines) > COSINE_GRACE or rise >= 0
        mean = self._mean("item/mean_pairwise_cosine", number)
        if mean is not None and ((mean > COSINE and stuck) or rise > COSINE_RISE):
            cure = "; leave --item_negatives catalogue out (most negatives' rows get no gradient under it)"
            self._warn(
                "item/mean_pairwise_cosine",
                f"random items have a mean cosine of {number:.2f} ({rise:+.2f} since the start): their rows grow "
                "alike. If validation falls too, lower --learning_rate or --item_coef, or warm-start with "
                f"recipes/contrastive.py{cure * whole_catalogue}.",
                state,
            )

    def _warn(self, cause: str, sentence: str, state) -> None:
        if cause not in self.warned:
            self.warned.add(cause)
            logger.warning("step %d: %s", state.global_step, sentence)
