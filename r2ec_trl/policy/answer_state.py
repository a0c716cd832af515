"""The answer state: the last hidden state at the marker, which scores the catalogue (paper §3)."""

import functools
import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from trl.trainer.utils import FusedCausalLMOutput

from r2ec_trl.policy.batching import check_length, length_sorted_batches
from r2ec_trl.policy.linear import fast_linear
from r2ec_trl.policy.releases import cache_name, is_checkpointing
from r2ec_trl.policy.shared_prompt import PaddedRows, shared_batches, shares_prompts
from r2ec_trl.progress import track

MOST_WASTE = 1.04  # paddings included, over the tokens
PREFIX_TOKENS, PREFIX_SEQUENCES = 16, 4  # from which on a common prefix pays


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
    Index of the last 1 of each row of a `(batch, length)` mask: where the answer state of a row is.

    >>> answer_position(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]))
    tensor([2, 3])
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * (attention_mask != 0)).argmax(dim=1)


def select_answer_state(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The rows of `(batch, length, d)` hidden states at [`answer_position`], `(batch, d)`."""
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    return hidden_states[rows, answer_position(attention_mask).to(hidden_states.device)]


def add_answer_state(model: PreTrainedModel, shared_prompt: bool = True) -> None:
    """
    Let `model` hand out its answer states; call it on the base model, before or after PEFT wraps it.

    `model(input_ids=, attention_mask=, answer_state_only=True)` runs the backbone alone, without the LM head, and
    `model(..., labels=, fused_lm_head=True)` (TRL's fused head, if it was added) returns its log-probabilities with
    the answer state of the same pass. Both lay their rows out anew ([`~r2ec_trl.policy.shared_prompt.pack_rows`]):
    paddings go to the right, rows that share a prompt compute it once, and the LM head sees the labelled positions
    alone. What they return has the shape of what went in. With a cache as `start=` the first form goes on from it.
    Any other call, `generate` included, is unchanged. A second call can only switch sharing off; where another
    trainer has patched the model since, it goes over that patch again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch.
        shared_prompt (`bool`, *optional*, defaults to `True`):
            `False` keeps every row by itself.
    """
    if not shared_prompt and "_shares_prompts" in vars(model):
        model._shares_prompts = False
    if getattr(model.forward, "hands_out_answer_state", False):
        return
    inner_forward = model.forward

    # `generate` checks its keyword arguments against this signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, answer_state_only=False, prompt_lengths=None, start=None, **kwargs):
        if not fused_lm_head and not answer_state_only:
            return inner_forward(*args, **kwargs)
        # layers recomputed in the backward pass, out of here, must meet the linear of the forward pass again
        recomputed = self.training and is_checkpointing(self) and torch.is_grad_enabled()
        with nullcontext() if recomputed else fast_linear(self.get_input_embeddings().weight):
            if start is not None:  # padding on the right is not seen: no mask
                hidden = self.base_model(input_ids=kwargs["input_ids"], use_cache=True, **{cache_name(self): start})
                return AnswerStateOutput(
                    answer_state=select_answer_state(hidden.last_hidden_state, kwargs["attention_mask"])
                )
            return packed_forward(self, args, kwargs, answer_state_only, prompt_lengths)

    def packed_forward(self, args, kwargs, answer_state_only, prompt_lengths):
        labels = kwargs.pop("labels", None)
        rows = PaddedRows(kwargs.pop("input_ids"), kwargs.pop("attention_mask"), labels, prompt_lengths)
        # without either nothing says what is prompt; the balance of experts is counted over a two-dimensional mask
        balances = kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
        share = (labels is not None or prompt_lengths is not None) and not balances
        packed = rows.pack(self.config.get_text_config().hidden_size if share and shares_prompts(self) else None)
        kwargs.update(packed.model_inputs(self))
        if answer_state_only:
            hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
            return AnswerStateOutput(answer_state=hidden.flatten(0, 1)[packed.ends.to(hidden.device)])
        sources, labels = rows.scored(packed)
        states = []

        def read(module, inputs, outputs):
            hidden = outputs.last_hidden_state.flatten(0, 1)  # (groups * length, d)
            states.append(hidden[packed.ends.to(hidden.device)])
            outputs.last_hidden_state = hidden[sources.to(hidden.device)][None]  # (1, labels, d)
            return outputs

        handle = self.base_model.register_forward_hook(read)
        try:
            outputs = inner_forward(*args, fused_lm_head=True, shift_labels=labels[None], **kwargs)
        finally:
            handle.remove()
        fields = {name: rows.unpack(value) for name, value in outputs.items()}
        return AnswerStateOutput(**fields, answer_state=states[-1])

    forward.hands_out_answer_state = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    if "_shares_prompts" not in vars(model):
        model._shares_prompts = None if shared_prompt else False


def encode_states(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    token_budget: int = 16_384,
    prompt_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """
    Answer states of token sequences, each read at its last token; sorted by length, batched by a token budget.

    Gradient flows if it is enabled: wrap the call in `torch.no_grad()` where none is wanted. Then what all sequences
    start with, such as an instruction, is computed once ([`common_prefix`]), and paddings are kept few.

    Args:
        model (`torch.nn.Module`):
            A model that went through [`add_answer_state`], or a PEFT model around one.
        sequences (`Sequence[Sequence[int]]`):
            Token ids, any lengths.
        pad_token_id (`int`):
            Pads on the right; padded positions are masked.
        token_budget (`int`, *optional*, defaults to `16384`):
            Most tokens a forward, padding included (a longer sequence goes alone).
        prompt_lengths (`Sequence[int]`, *optional*):
            Tokens of each sequence that others may start with too: those are computed once where the model can
            ([`~r2ec_trl.policy.shared_prompt.shares_prompts`]).

    Returns:
        `torch.Tensor` of shape `(len(sequences), d)`, float32, in the order given.
    """
    device = next(model.parameters()).device
    longest = max(map(len, sequences))
    check_length(getattr(model, "config", None), longest, "The prompts", "`max_prompt_length` or `max_item_length`")
    patched = next(module for module in model.modules() if "_shares_prompts" in vars(module))
    start = 0
    if prompt_lengths is not None and shares_prompts(patched):
        batches = shared_batches(sequences, prompt_lengths, token_budget)
    elif torch.is_grad_enabled():  # processes that share weights out take as many forwards as each other
        batches = length_sorted_batches([len(sequence) for sequence in sequences], token_budget)
    else:
        cached = not (patched.training and is_checkpointing(patched))  # layers drop a cache there
        start = common_prefix(sequences) if cached and prompt_lengths is None and shares_prompts(patched) else 0
        batches = length_sorted_batches([len(sequence) - start for sequence in sequences], token_budget, MOST_WASTE)
    prefix = _Prefix(model, sequences[0][:start]) if start else None
    states = []
    for batch in track(batches, "prompts encoded"):
        input_ids, attention_mask = pad_right([sequences[i][start:] for i in batch], pad_token_id, device)
        more: dict[str, Any] = {}
        if prompt_lengths is not None:
            more["prompt_lengths"] = [prompt_lengths[i] for i in batch]
        if prefix is not None:
            more["start"] = prefix.repeated(len(batch))
        output = model(input_ids=input_ids, attention_mask=attention_mask, answer_state_only=True, **more)
        states.append(output.answer_state.float())
    order = torch.tensor([i for batch in batches for i in batch], device=device)
    return torch.cat(states)[order.argsort()]  # (n, d)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """
    How many tokens to compute once for all sequences: what they start with, each keeping one of its own; 0 where that
    is too little to pay.

    >>> common_prefix([[*range(20), 7], [*range(20), 8, 9]] * 2)
    20
    """
    first, last = min(map(list, sequences)), max(map(list, sequences))  # what these two start with, all in between do
    same = [one == other for one, other in zip(first, last)]
    length = min(len([*takewhile(bool, same)]), min(map(len, sequences)) - 1)
    return length if length >= PREFIX_TOKENS and len(sequences) >= PREFIX_SEQUENCES else 0


class _Prefix:
    """Keys and values of a prefix."""

    def __init__(self, model: torch.nn.Module, ids: Sequence[int]):
        input_ids, attention_mask = pad_right([ids], 0, next(model.parameters()).device)
        config: Any = next(module.config for module in model.modules() if "_shares_prompts" in vars(module))
        self.cache = Cache(layers=[DynamicLayer() for _ in range(config.get_text_config().num_hidden_layers)])
        model(input_ids=input_ids, attention_mask=attention_mask, start=self.cache, answer_state_only=True)

    def repeated(self, rows: int) -> Cache:
        """A cache that `rows` sequences go on from."""
        layers = []
        for layer in self.cache.layers:
            layers.append(DynamicLayer())
            layers[-1].update(*(part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values)))
        return Cache(layers=layers)


def pad_right(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `(n, length)` token ids and their attention mask."""
    return _padded(sequences, pad_token_id, device, "right")


def pad_left(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`pad_right`] with the padding on the left, for `generate`."""
    return _padded(sequences, pad_token_id, device, "left")


def _padded(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    masks = [torch.ones_like(row) for row in ids]
    parts = [pad_sequence(rows, True, value, side).to(device) for rows, value in ((ids, pad_token_id), (masks, 0))]
    return parts[0], parts[1]
