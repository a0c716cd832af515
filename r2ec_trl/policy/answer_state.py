"""The answer state: the last hidden state at the marker, which scores the catalogue (paper §3)."""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from r2ec_trl.policy.batching import length_sorted_batches
from r2ec_trl.progress import track


@dataclass
class AnswerStateOutput(FusedCausalLMOutput):
    """
    TRL's fused output with one more declared field (a loose attribute is lost in accelerate's fp32 conversion).

    Args:
        answer_state (`torch.Tensor` of shape `(batch, d)`):
            Last hidden state at the last attended position of each row.
    """

    answer_state: torch.Tensor | None = None


def answer_position(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Index of the last 1 of each row of a `(batch, length)` mask: the one place that says where the answer state is.

    >>> answer_position(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]))
    tensor([2, 3])
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * (attention_mask != 0)).argmax(dim=1)


def select_answer_state(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The rows of `(batch, length, d)` hidden states at [`answer_position`], `(batch, d)`."""
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    return hidden_states[rows, answer_position(attention_mask).to(hidden_states.device)]


def roll_rows(rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """
    Each row of `(batch, length)` rolled to the left by its own `shift`, `(batch,)`.

    >>> roll_rows(torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.tensor([2, 0]))
    tensor([[7, 8, 0, 0],
            [5, 6, 7, 8]])
    """
    length = rows.shape[1]
    positions = torch.arange(length, device=rows.device) + shift[:, None]  # (batch, length)
    return rows.gather(1, positions % length)


def unroll_scores(scores: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """
    Undo [`roll_rows`] for per-token scores `(batch, length - 1)` of rolled rows; where the padding was, 0.

    >>> unroll_scores(torch.tensor([[.1, .2, .3]]), torch.tensor([2]))
    tensor([[0.0000, 0.0000, 0.1000]])
    """
    positions = torch.arange(scores.shape[1], device=scores.device) - shift[:, None]
    return scores.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, 0)


def add_answer_state(model: PreTrainedModel) -> None:
    """
    Let `model` hand out its answer states; call it on the base model, before or after PEFT wraps it.

    `model(input_ids=, attention_mask=, answer_state_only=True)` runs the backbone alone, without the LM head, and
    `model(..., labels=, fused_lm_head=True)` (TRL's fused head, if it was added) returns its log-probabilities with
    the answer state of the same pass. TRL pads prompts on the left; that pass moves the padding to the right first, so
    that positions count from 0 for any kind of position embedding and no attention row is fully masked. Any other
    call, `generate` included, is unchanged. A second call does nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch.
    """
    if getattr(model, "_hands_out_answer_state", False):
        return
    inner_forward = model.forward

    # `generate` checks its keyword arguments against this signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, answer_state_only=False, **kwargs):
        if answer_state_only:
            outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
            return AnswerStateOutput(
                answer_state=select_answer_state(outputs.last_hidden_state, kwargs["attention_mask"])
            )
        if not fused_lm_head:
            return inner_forward(*args, **kwargs)
        states = []
        attention_mask = kwargs["attention_mask"]
        shift = (attention_mask != 0).long().argmax(dim=1)  # (batch,), paddings on the left
        for name in ("input_ids", "attention_mask", "labels"):
            kwargs[name] = roll_rows(kwargs[name], shift)

        def catch(module, inputs, outputs):
            states.append(select_answer_state(outputs.last_hidden_state, kwargs["attention_mask"]))

        handle = self.base_model.register_forward_hook(catch)
        try:
            outputs = inner_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            handle.remove()
        fields = {
            name: unroll_scores(value, shift) if value.shape == (len(shift), attention_mask.shape[1] - 1) else value
            for name, value in outputs.items()
        }
        return AnswerStateOutput(**fields, answer_state=states[-1])

    model.forward = types.MethodType(forward, model)
    model._hands_out_answer_state = True


def encode_states(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    token_budget: int = 16_384,
) -> torch.Tensor:
    """
    Answer states of token sequences, each read at its last token; sorted by length, batched by a token budget.

    Gradient flows if it is enabled: wrap the call in `torch.no_grad()` where none is wanted.

    Args:
        model (`torch.nn.Module`):
            A model that went through [`add_answer_state`], or a PEFT model around one.
        sequences (`Sequence[Sequence[int]]`):
            Token ids, any lengths.
        pad_token_id (`int`):
            Pads on the right; padded positions are masked.
        token_budget (`int`, *optional*, defaults to `16384`):
            Most tokens a forward, padding included (a longer sequence goes alone).

    Returns:
        `torch.Tensor` of shape `(len(sequences), d)`, float32, in the order given.
    """
    device = next(model.parameters()).device
    batches = length_sorted_batches([len(sequence) for sequence in sequences], token_budget)
    states = []
    for batch in track(batches, "prompts encoded"):
        input_ids, attention_mask = pad_right([sequences[i] for i in batch], pad_token_id, device)
        output = model(input_ids=input_ids, attention_mask=attention_mask, answer_state_only=True)
        states.append(output.answer_state.float())
    order = torch.tensor([i for batch in batches for i in batch], device=device)
    return torch.cat(states)[order.argsort()]  # (n, d)


def pad_right(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `(n, length)` token ids and their attention mask."""
    length = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return input_ids.to(device), attention_mask.to(device)
