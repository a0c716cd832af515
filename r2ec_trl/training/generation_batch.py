"""What one generation batch is: rolled out, scored and rewarded together, then trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict

from r2ec_trl.policy.rollouts import Rollout


@dataclass(frozen=True)
class GenerationBatch:
    """
    One generation batch as this process sees it; B·G are its own rollouts, in the order of generation.

    Args:
        prompts (`list[list[int]]`):
            Token ids of the user prompt of each rollout, B·G of them.
        rollouts (`list[Rollout]`):
            The reasoning of each, B·G of them.
        targets (`torch.Tensor` of shape `(B*G,)`):
            Rows of the targets in the item table.
        candidates (`list[int]`):
            The distinct targets of all processes, C of them, ascending: the same on every process.
        states (`torch.Tensor` of shape `(B*G, d)`):
            Answer states of the reward pass, projected as the table's rows are.
        target_rows (`torch.Tensor` of shape `(C, d)`):
            Rows of the candidates, encoded before the reward pass.
        catalogue_rows (`torch.Tensor` of shape `(N, d)`, *optional*):
            The whole table of that moment, where the whole catalogue competes (`item_negatives="catalogue"`).
        rewards (`torch.Tensor` of shape `(all rollouts, reward functions)`):
            Rewards of all processes' rollouts, NaN where a function had nothing to say.
    """

    prompts: list[list[int]]
    rollouts: list[Rollout]
    targets: torch.Tensor
    candidates: list[int]
    states: torch.Tensor
    target_rows: torch.Tensor
    catalogue_rows: torch.Tensor | None
    rewards: torch.Tensor

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and reasoning of each rollout."""
        return [prompt + rollout.ids for prompt, rollout in zip(self.prompts, self.rollouts, strict=True)]

    @property
    def positions(self) -> torch.Tensor:
        """Where each rollout's target stands among the candidates, `(B*G,)`."""
        candidates = torch.tensor(self.candidates, device=self.targets.device)
        return torch.searchsorted(candidates, self.targets)


def whole_groups(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Micro-batches of shuffled rows, dealt out anew so that a group's rows stand side by side; groups keep the order in
    which the shuffle brought them up.

    Args:
        batches (`list[dict]`):
            Tensors and lists of one length a micro-batch, scalars as they are; `group` says whose rollout a row is.

    >>> shuffled = [{"group": torch.tensor([4, 2])}, {"group": torch.tensor([2, 4])}]
    >>> [batch["group"].tolist() for batch in whole_groups(shuffled)]
    [[4, 4], [2, 2]]
    """
    groups = torch.cat([batch["group"] for batch in batches]).tolist()
    order = sorted(range(len(groups)), key=lambda row: groups.index(groups[row]))

    def dealt(values: list[Any]) -> Any:
        if values[0] is None or (isinstance(values[0], torch.Tensor) and values[0].ndim == 0):
            return values[0]
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)[torch.tensor(order, device=values[0].device)]
        rows = [row for value in values for row in value]
        return [rows[row] for row in order]

    return split_tensor_dict({name: dealt([batch[name] for batch in batches]) for name in batches[0]}, len(batches))


def without_rows(batch: dict[str, Any], left_out: torch.Tensor) -> dict[str, Any]:
    """
    A micro-batch without some of its rows; where nothing would be left, the first stays: a forward needs one.

    >>> without_rows({"a": torch.tensor([1, 2]), "n": torch.tensor(7.0)}, torch.tensor([True, False]))
    {'a': tensor([2]), 'n': tensor(7.)}
    """
    if not left_out.any():
        return batch
    kept = (~left_out).nonzero()[:, 0] if not left_out.all() else torch.zeros(1, dtype=torch.long)

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[kept.to(value.device)] if value.ndim else value
        return [value[row] for row in kept.tolist()] if isinstance(value, list) else value

    return {name: part(value) for name, value in batch.items()}
