"""The reward pass: fresh rows for the batch's targets, then each rollout's rank in the whole catalogue (M1, M2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder, share_encoding
from r2ec_trl.items.scoring import CatalogueScores, exclusion_matrix
from r2ec_trl.items.table import Encoder, ItemTable
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.telemetry import Telemetry

NUM_TOP_ITEMS = 10  # items a reward sees in `top_item_ids`


@dataclass(frozen=True)
class Scored:
    """
    Rollouts of this process with their scores.

    Args:
        targets (`torch.Tensor` of shape `(B*G,)`), candidates (`list[int]`), states (`torch.Tensor` of `(B*G, d)`):
            As in [`~r2ec_trl.training.generation_batch.GenerationBatch`].
        scores ([`~r2ec_trl.items.scoring.CatalogueScores`]):
            Rank, log-probability and score of each target.
        top_item_ids (`list[list[str]]`):
            The first items of each rollout.
    """

    targets: torch.Tensor
    candidates: list[int]
    states: torch.Tensor
    scores: CatalogueScores
    top_item_ids: list[list[str]]

    def rows(self) -> list[dict[str, Any]]:
        """What the reward functions are given of each rollout."""
        probs = self.scores.logprob.exp()
        columns = [*(values.tolist() for values in (self.scores.rank, probs, self.scores.score)), self.top_item_ids]
        names = ("target_rank", "target_prob", "target_score", "top_item_ids")
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


class RewardPass:
    """
    Scores rollouts with the policy as it is.

    Args:
        table, prompts, telemetry:
            The trainer's.
        settings ([`~r2ec_trl.training.recpo_config.RecPOConfig`]):
            `table_refresh_*`, `item_*`, `mask_history` and `forward_token_budget`.
        accelerator ([`~accelerate.Accelerator`]):
            Shares the work out.
    """

    def __init__(self, table: ItemTable, prompts: Prompts, settings: Any, accelerator: Any, telemetry: Telemetry):
        self.table, self.prompts, self.settings = table, prompts, settings
        self.accelerator, self.telemetry = accelerator, telemetry

    def __call__(
        self,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Sequence[int]],
        rollouts: Sequence[Rollout],
    ) -> Scored:
        """
        Args:
            model ([`~transformers.PreTrainedModel`]):
                The policy, frozen.
            rows (`list[dict]`), prompts (`list[list[int]]`), rollouts (`list[Rollout]`):
                Users, their prompts' token ids and their reasonings, B·G of each.
        """
        table, settings, telemetry = self.table, self.settings, self.telemetry
        sequences = [[*prompt, *rollout.ids] for prompt, rollout in zip(prompts, rollouts, strict=True)]
        targets = torch.tensor(table.row_indices(row["target"] for row in rows), device=table.device)
        candidates = self.distinct(targets)
        excluded = None
        if settings.mask_history:
            excluded = exclusion_matrix([table.row_indices(row["history"]) for row in rows], table.device)
        rank = partial(table.rank, targets=targets, temperature=settings.item_temperature, excluded=excluded)
        exact = partial(torch.autocast, table.device.type, enabled=False)
        encoder = make_encoder(model, self.prompts, settings.forward_token_budget)
        with telemetry.timed("score"):
            states = table.project(encoder(sequences, prompt_lengths=[*map(len, prompts)])).to(table.device)
        watched, stale, stale_rank = telemetry.is_watched_step, None, None
        with telemetry.timed("items"):
            encoder = share_encoding(encoder, self.accelerator, table)
            if not self.refresh(encoder, candidates, sum(gather_object([sum(map(len, sequences))]))):
                stale = table.take(candidates)
                if watched:
                    with exact():
                        stale_rank = rank(states).rank
                table.refresh(encoder, candidates)
        with telemetry.timed("score"), exact():
            scores = rank(states)
            best = table.best(states, NUM_TOP_ITEMS, excluded=excluded)[1].tolist()
        if watched:
            telemetry.table(table, candidates, stale, stale_rank, scores.rank)
        return Scored(targets, candidates, states, scores, [[table.item_ids[i] for i in r if i >= 0] for r in best])

    def distinct(self, targets: torch.Tensor) -> list[int]:
        """The distinct targets of all processes, ascending; [`UserError`] where they give the item term no choice."""
        candidates = sorted(set(gather_object(targets.tolist())))
        if len(candidates) < 2 and self.settings.item_coef and self.settings.item_negatives == "batch":
            raise UserError(
                "All users of a generation batch share one target, so the item term has nothing to compare it with; "
                "use more users a batch, `--item_negatives catalogue`, or `--item_coef 0`."
            )
        return candidates

    def refresh(self, encoder: Encoder, candidates: Sequence[int], batch_tokens: int) -> bool:
        """Re-encode as much as is due besides the candidates; says whether that was the whole table."""
        budget = int(self.settings.table_refresh_budget * batch_tokens)
        if self._is_due() or self.table.is_empty or self.table.num_tokens <= budget:
            self.table.refresh(encoder)
            return True
        self.table.refresh(encoder, [row for row in self.table.next_slice(budget) if row not in set(candidates)])
        return False

    def _is_due(self) -> bool:
        """Whether a multiple of `table_refresh_steps` has come since the generation batch before."""
        settings, step, every = self.settings, self.telemetry.step(), self.settings.table_refresh_steps
        if every is None:
            return False
        since = settings.steps_per_generation * settings.num_iterations // settings.gradient_accumulation_steps
        return step // every > (step - max(1, since)) // every


def as_sampled(completion: list[dict[str, str]], rollout: Rollout, tokenizer: Any) -> list[dict[str, str]]:
    """The message without a marker that the policy did not write."""
    if rollout.has_marker:
        return completion
    text = tokenizer.decode(rollout.ids[: sum(rollout.trained)], skip_special_tokens=True)
    return [{**completion[0], "content": text}]
