"""The aligned warm start: answer states after the policy's own sampled reasoning, and a term that teaches to stop."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from r2ec_trl.policy.answer_state import pad_right
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.training.objective import candidate_logprobs
from r2ec_trl.training.telemetry import Telemetry


def best_of_groups(probabilities: torch.Tensor, min_spread: float) -> torch.Tensor:
    """
    The best rollout of each group `(users, G)`, as a mask; none where the standard deviation is below `min_spread`.

    >>> best_of_groups(torch.tensor([[0.1, 0.9], [0.5, 0.5]]), min_spread=0.01).tolist()
    [[False, True], [False, False]]
    """
    best = torch.zeros_like(probabilities, dtype=torch.bool)
    best[torch.arange(len(best)), probabilities.argmax(dim=1)] = True
    return best & (probabilities.std(dim=1, unbiased=False) >= min_spread)[:, None]


class SampledReasoning:
    """
    M8 on states after sampled reasoning, mixed with states without.

    Args:
        prompts, telemetry:
            The trainer's.
        settings ([`~r2ec_trl.training.contrastive_trainer.ContrastiveConfig`]):
            `reasoning_share`, `num_generations`, `max_completion_length`, `temperature`, `top_k`, `stop_coef`,
            `taught_words`, `min_reward_spread` and `item_temperature`.
    """

    def __init__(self, prompts: Prompts, settings: Any, telemetry: Telemetry):
        self.prompts, self.settings, self.telemetry = prompts, settings, telemetry
        self.reader = MarkerReader(prompts.tokenizer, prompts.config.marker)

    def num_reasoned(self, users: int) -> int:
        """How many of a batch's users reason: its first ones, as the order of rows is drawn anyway."""
        return math.ceil(self.settings.reasoning_share * users)

    def roll_out(self, policy: Any, prompt_ids: Sequence[Sequence[int]]) -> list[Rollout]:
        """G sampled rollouts of each user that reasons, side by side, then the marker alone for each other user."""
        settings = self.settings
        asked = [
            ids for ids in prompt_ids[: self.num_reasoned(len(prompt_ids))] for _ in range(settings.num_generations)
        ]
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
        made = generate_reasoning(policy, self.reader, asked, settings.max_completion_length, sampling=sampling)
        missing = sum(not rollout.has_marker for rollout in made) / len(made)
        length = sum(sum(rollout.trained) for rollout in made) / len(made)
        self.telemetry.add(**{"rollout/missing_marker": missing, "rollout/mean_length": length})
        nothing = self.reader.finish([], end_ids=[])
        return made + [nothing] * (len(prompt_ids) - self.num_reasoned(len(prompt_ids)))

    def taught(self, item_id: str) -> list[int]:
        """Token ids of the first `taught_words` words of an item's title, and of the marker."""
        return self.prompts.title_ids(item_id, self.settings.taught_words) + self.prompts.marker_ids

    def loss(
        self,
        model: torch.nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        rollouts: Sequence[Rollout],
        items: Sequence[str],
        project: Callable[[torch.Tensor], torch.Tensor],
        candidates: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """
        M8, the mean over users of the mean over a user's rollouts; and `stop_coef` times the language-model loss (mean
        over tokens) of the best rollout of each group, its marker included, where that had to be appended: a term on
        those that end by themselves as well shrinks reasonings to nothing. Best: by the target's probability among the
        batch's targets. With `taught_words` the language-model loss is that of the next purchases' first words
        instead, for the users who reason: no answer state is read behind them.

        Args:
            model ([`~torch.nn.Module`]):
                The policy with TRL's fused head and our answer states.
            prompt_ids, rollouts:
                Users, and what [`~SampledReasoning.roll_out`] gave.
            items (`list[str]`):
                Their targets' ids.
            project (`Callable`):
                States as the table scores them.
            candidates (`torch.Tensor` of shape `(C, d)`):
                Rows of the batch's distinct targets.
            positions (`torch.Tensor` of shape `(users,)`):
                Whose target is which of them.
        """
        settings, users = self.settings, len(prompt_ids)
        reasoned, size = self.num_reasoned(users), settings.num_generations
        written = reasoned * size  # rows
        owners = torch.tensor([*(row // size for row in range(written)), *range(reasoned, users)])
        taught = [self.taught(item) for item in items[:reasoned]] if settings.taught_words else []
        asked = [prompt_ids[user] for user in [*owners.tolist(), *range(len(taught))]]
        lengths = [len(ids) for ids in asked]
        answers = [*(rollout.ids for rollout in rollouts), *taught]
        sequences = [[*ids, *answer] for ids, answer in zip(asked, answers, strict=True)]
        input_ids, attention_mask = pad_right(sequences, self.prompts.tokenizer.pad_token_id, candidates.device)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        reasoning = (places >= torch.tensor(lengths, device=places.device)[:, None]) & (attention_mask != 0)
        reasoning[written : len(owners)] = False
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=input_ids.masked_fill(~reasoning, -100),
            prompt_lengths=lengths,
            fused_lm_head=True,
        )
        owners = owners.to(positions.device)
        logprobs = candidate_logprobs(
            project(outputs.answer_state[: len(rollouts)]), candidates, positions[owners], settings.item_temperature
        )
        weights = torch.ones_like(logprobs) / users
        weights[:written] /= size
        best = best_of_groups(logprobs[:written].detach().exp().view(reasoned, size), settings.min_reward_spread)
        teaches = torch.zeros(len(sequences), dtype=torch.bool, device=best.device)
        if taught:
            teaches[len(rollouts) :] = True
        else:
            appended = [not rollout.has_marker for rollout in rollouts[:written]]
            teaches[:written] = best.flatten() & torch.tensor(appended, device=best.device)
        words = reasoning[:, 1:] & teaches[:, None]
        stop = -(outputs.log_probs * words).sum() / words.sum().clamp(min=1)
        item = -(weights * logprobs).sum()
        self.telemetry.add(
            **{
                "loss/item": item.item(),
                "loss/stop": stop.item(),
                "rollout/no_signal": 1 - best.any(dim=1).float().mean().item(),
            }
        )
        return item + settings.stop_coef * stop
