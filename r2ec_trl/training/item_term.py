"""The item term of the objective (M6, M7): the recommendation as one more action, clipped like a token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl import GRPOTrainer

from r2ec_trl.items.table import ItemTable
from r2ec_trl.training.generation_batch import GenerationBatch
from r2ec_trl.training.objective import (
    candidate_logprobs,
    cispo_objective,
    clipped_objective,
    item_credit_weights,
    sapo_objective,
)

Encode = Callable[[Sequence[Sequence[int]]], torch.Tensor]


class ItemTerm:
    """
    Credits the item of the best rollouts of each group, and gives the loss of those items.

    The candidates are encoded with gradient once an optimizer step, in its last micro-step: before that their rows are
    constants whose gradients are summed up, as in GradCache (arXiv 2101.06983), and then handed on to the encoder.

    Args:
        table ([`~r2ec_trl.items.table.ItemTable`]):
            Item prompts and the projection of states.
        settings ([`~r2ec_trl.training.recpo_config.RecPOConfig`]):
            `item_*`, `epsilon`, `epsilon_high`, `num_generations` and how often batches are reused.
        encode (`Callable`):
            Token sequences → states `(n, d)` with the policy as it is now, with gradient.
        every_process (`bool`, *optional*, defaults to `False`):
            Encode the candidates even where no row of the micro-batch needs them: DeepSpeed wants the same forwards
            on every process.
    """

    def __init__(self, table: ItemTable, settings: Any, encode: Encode, every_process: bool = False):
        self.table, self.settings, self.encode, self.every_process = table, settings, encode, every_process
        self._rows: torch.Tensor | None = None  # of the candidates with the current weights, (C, d)
        self._gradient: torch.Tensor | None = None  # of the loss of earlier micro-steps in them, (C, d)
        self.epsilon_low = settings.epsilon
        self.epsilon_high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high

    def prepare(
        self, batch: GenerationBatch, advantages: torch.Tensor, eligible: torch.Tensor, own: slice
    ) -> dict[str, torch.Tensor]:
        """
        What the loss needs of each rollout of this process.

        Args:
            batch ([`~r2ec_trl.training.generation_batch.GenerationBatch`]):
                What was rolled out.
            advantages (`torch.Tensor` of shape `(all rollouts,)`):
                Advantages of all processes' rollouts: a group can straddle processes.
            eligible (`torch.Tensor` of shape `(all rollouts,)`):
                Which of them may carry the term.
            own (`slice`):
                This process's among them.

        Returns:
            `dict` of tensors of shape `(B*G,)`: `item_weights` (δ of M7), `item_positions` (the target among the
            candidates) and, where an optimizer step lies between rollout and update, `old_item_logprobs`.
        """
        settings, self._rows, self._gradient = self.settings, batch.target_rows, None
        weights = item_credit_weights(advantages, settings.num_generations, settings.item_credit_count, eligible)
        positions = batch.positions.to(advantages.device)
        prepared = {"item_weights": weights[own], "item_positions": positions}
        if settings.gradient_accumulation_steps % (settings.steps_per_generation * settings.num_iterations) != 0:
            prepared["old_item_logprobs"] = self.logprobs(batch.states, batch.target_rows, positions, batch)
        return prepared

    def loss(
        self,
        states: torch.Tensor,
        inputs: dict[str, Any],
        batch: GenerationBatch,
        normalizer: torch.Tensor,
        last: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        -Σ δ ℓ(r_{T+1}, A) of M7 over a micro-batch.

        Args:
            states (`torch.Tensor` of shape `(rows, d)`):
                Answer states of the micro-batch's own forward.
            inputs (`dict`):
                The micro-batch: `advantages` and what [`~ItemTerm.prepare`] made.
            batch ([`~r2ec_trl.training.generation_batch.GenerationBatch`]):
                The generation batch it is a part of.
            normalizer (`torch.Tensor`, a scalar or of shape `(rows,)`):
                What one token's loss is divided by, see [`~r2ec_trl.training.objective.token_normalizer`].
            last (`bool`, *optional*, defaults to `True`):
                Whether this is the last micro-step before an optimizer step or new rollouts.

        Returns:
            The loss (a scalar); a scalar of value 0 whose gradient is that of the earlier micro-steps in the encoder
            (it belongs into the same backward); and detached means over the credited rows: the item's log-probability
            and how often the ratio was clipped, `None` both where no row is credited.
        """
        carried = inputs["item_weights"].nonzero().squeeze(1)
        nothing = states.sum() * 0.0
        if len(carried) == 0 and not self.every_process and not (last and self._gradient is not None):
            self._rows = None if last else self._rows
            return nothing, nothing, None, None
        candidates = self.candidate_rows(batch, last)
        projected = self.table.project(states[carried])
        logprobs = self.logprobs(projected, candidates, inputs["item_positions"][carried], batch)
        old = inputs["old_item_logprobs"][carried] if "old_item_logprobs" in inputs else logprobs.detach()
        advantages = inputs["advantages"][carried]
        terms, clipped = self._terms(logprobs, old, advantages)  # (carried rows,)
        summed = (terms / normalizer[carried]).sum() if normalizer.ndim else terms.sum() / normalizer
        loss = -summed + candidates.sum() * 0.0
        earlier = nothing
        if last:
            if self._gradient is not None:
                earlier = (candidates * self._gradient).sum()
                earlier = earlier - earlier.detach()
            self._rows = self._gradient = None
        elif candidates.requires_grad:
            (gradient,) = torch.autograd.grad(loss, candidates, retain_graph=True)
            self._gradient = gradient if self._gradient is None else self._gradient + gradient
        if len(carried) == 0:
            return loss, earlier, None, None
        return loss, earlier, logprobs.detach().mean(), clipped.float().mean()

    def _terms(
        self, logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's term under TRL's `loss_type`, and whether its ratio is clipped: it then has no more say."""
        settings, low, high = self.settings, self.epsilon_low, self.epsilon_high
        ratio = (logprobs.detach() - old).exp()
        if settings.loss_type == "cispo":
            return cispo_objective(logprobs, old, advantages, high), (ratio > high) & (advantages > 0)
        if settings.loss_type == "sapo":
            gates = settings.sapo_temperature_pos, settings.sapo_temperature_neg
            return sapo_objective(logprobs, old, advantages, *gates), torch.zeros_like(ratio)
        if settings.loss_type == "vespo":  # the item as a sequence of one action
            shape = (settings.vespo_k_pos, settings.vespo_lambda_pos, settings.vespo_k_neg, settings.vespo_lambda_neg)
            log_ratio = (logprobs.detach() - old)[:, None]
            gamma = GRPOTrainer.get_gamma_weights(
                advantages[:, None], log_ratio, torch.ones_like(log_ratio), None, *shape
            )
            return gamma[:, 0] * advantages * logprobs, torch.zeros_like(ratio)
        clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
        delta = getattr(settings, "delta", None)
        return clipped_objective(logprobs, old, advantages, low, high, delta), clipped

    def candidate_rows(self, batch: GenerationBatch, last: bool = True) -> torch.Tensor:
        """
        Rows of the candidates, `(C, d)`: encoded with gradient in the last micro-step, a leaf before; constants where
        `item_gradient` is off.
        """
        if self.settings.item_gradient == "none":
            return batch.target_rows
        if last:
            return self._encoded(batch)
        if self._rows is None:  # an optimizer step has come between
            with torch.no_grad():
                self._rows = self._encoded(batch)
        return self._rows.detach().requires_grad_()

    def _encoded(self, batch: GenerationBatch) -> torch.Tensor:
        return self.table.project(self.encode([self.table.token_ids[row] for row in batch.candidates]))

    def logprobs(
        self, states: torch.Tensor, candidates: torch.Tensor, positions: torch.Tensor, batch: GenerationBatch
    ) -> torch.Tensor:
        """log π(v+ | x, o) of M6 for projected states `(n, d)`, among the candidates or the whole catalogue."""
        item_temperature = self.settings.item_temperature
        if batch.catalogue_rows is None:
            return candidate_logprobs(states, candidates, positions, item_temperature)
        chosen = torch.tensor(batch.candidates, device=candidates.device)
        rows = batch.catalogue_rows.index_copy(0, chosen, candidates.to(batch.catalogue_rows.dtype))
        return candidate_logprobs(states, rows, chosen[positions], item_temperature)
