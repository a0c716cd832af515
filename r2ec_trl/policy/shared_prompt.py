"""One forward a group: rollouts that share a prompt are packed into one row, so that the prompt is computed once."""

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from r2ec_trl.policy.adapters import is_packed

logger = logging.getLogger(__name__)

TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05  # by which packed states may differ from plain ones, in fp32 and below


@dataclass(frozen=True)
class PackedRows:
    """
    Token sequences laid out for one forward, and where to read each of them.

    A group of sequences with one prompt `p` of n tokens is one row `[p_0 … p_{n-2} | p_{n-1} c¹ | p_{n-1} c² | …]`:
    the prompt's last token stands before each completion, so that every completion token has a position of its own to
    be predicted from. Positions start again at n-1 in each segment. Without sharing each sequence is a row of its own.

    Args:
        input_ids, position_ids (`torch.Tensor` of shape `(groups, length)`):
            Padded on the right.
        segments (`torch.Tensor` of shape `(groups, length)`):
            0 for the prompt, 1, 2, … for the completions, one more for padding.
        attended (`torch.Tensor` of shape `(groups, length)`):
            True where a token stands.
        starts (`torch.Tensor` of shape `(rows,)`):
            Index of each sequence's segment in the flattened `(groups * length)` positions.
        ends (`torch.Tensor` of shape `(rows,)`):
            Index of its last token: where the answer state is.
        shared (`bool`):
            Whether any two sequences share a row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    attended: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    shared: bool

    def model_inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `position_ids` for a causal model, whose mask format is looked up."""
        if not self.shared:
            return {"input_ids": self.input_ids, "attention_mask": self.attended.long()}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": attention_masks(model, self.segments, self.position_ids),
        }


class PaddedRows:
    """
    Rows as TRL pads them, prompts on the left and completions on the right, and the way back to them.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, length)`):
            Token ids, and 1 where a token stands; a row's tokens stand side by side.
        labels (`torch.Tensor` of shape `(rows, length)`, *optional*):
            Token ids where they are scored, -100 elsewhere. The first one ends the prompt.
        prompt_lengths (`Sequence[int]`, *optional*):
            Tokens of each row that are prompt; by default what the labels say, without labels all of them.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ):
        attended = attention_mask != 0
        self.input_ids = input_ids
        self.first, self.count = attended.long().argmax(dim=1), attended.sum(dim=1)  # (rows,)
        index = torch.arange(input_ids.shape[1], device=input_ids.device) - self.first[:, None]  # within the row
        scored = torch.zeros_like(attended) if labels is None else attended & (labels != -100) & (index > 0)
        self.lengths = torch.where(scored.any(dim=1), scored.long().argmax(dim=1) - self.first, self.count)
        if prompt_lengths is not None:
            self.lengths = torch.as_tensor(prompt_lengths, device=input_ids.device)
        self.rows, self.columns = scored.nonzero(as_tuple=True)
        self.labels = input_ids if labels is None else labels

    def pack(self, hidden_size: int | None = None) -> PackedRows:
        """The rows laid out by [`pack_rows`]; shared for a model of this `hidden_size`, or not at all."""
        spans = zip(self.input_ids.tolist(), self.first.tolist(), self.count.tolist(), strict=True)
        sequences = [row[first : first + count] for row, first, count in spans]
        return pack_rows(sequences, self.lengths.tolist(), 0, self.input_ids.device, hidden_size)

    def scored(self, packed: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in the packed rows each label is predicted, `(labels,)`, and the labels; at least one, if of -100."""
        if len(self.rows) == 0:
            return packed.ends[:1], torch.full_like(packed.ends[:1], -100)
        index = self.columns - (self.first + self.lengths)[self.rows]
        return packed.starts[self.rows] + index, self.labels[self.rows, self.columns]

    def unpack(self, values: Any) -> Any:
        """Values of the labels, `(1, labels)`, where TRL looks for them, `(rows, length - 1)`, zeros elsewhere."""
        if not isinstance(values, torch.Tensor) or values.shape != (1, max(1, len(self.rows))):
            return values
        padded = values.new_zeros(len(self.input_ids), self.input_ids.shape[1] - 1)
        where = tuple(part.to(values.device) for part in (self.rows, self.columns - 1))
        return padded.index_put(where, values[0, : len(self.rows)])


def pack_rows(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    pad_token_id: int,
    device: torch.device | str,
    hidden_size: int | None = None,
) -> PackedRows:
    """
    Lay token sequences out for one forward; those with the same prompt share a row as far as that costs less.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Token ids of prompt and completion.
        prompt_lengths (`Sequence[int]`):
            Tokens of each that are prompt, at least 1.
        pad_token_id (`int`):
            Pads on the right.
        device (`torch.device`):
            Where the tensors go.
        hidden_size (`int`, *optional*):
            d of the model: attention grows with the square of a row, T tokens cost T (1 + T / 6d), so that a large
            group takes several rows. By default nothing is shared.

    >>> packed = pack_rows([[5, 6, 7, 1, 2], [5, 6, 7, 3]], [3, 3], pad_token_id=0, device="cpu", hidden_size=64)
    >>> packed.input_ids
    tensor([[5, 6, 7, 1, 2, 7, 3]])
    >>> packed.position_ids
    tensor([[0, 1, 2, 3, 4, 2, 3]])
    >>> packed.segments
    tensor([[0, 0, 1, 1, 1, 2, 2]])
    """
    tails = [len(sequence) - length + 1 for sequence, length in zip(sequences, prompt_lengths, strict=True)]
    groups = list(same_prompts(sequences, prompt_lengths)) if hidden_size else [[row] for row in range(len(tails))]

    def spread(size: int) -> tuple[list[list[int]], list[int]]:
        """At most `size` segments a row, and the tokens of each row."""
        rows = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        return rows, [prompt_lengths[row[0]] - 1 + sum(tails[member] for member in row) for row in rows]

    def cost(size: int) -> float:
        widths = spread(size)[1]
        return len(widths) * max(widths) * (1 + max(widths) / (6 * (hidden_size or 1)))

    rows, widths = spread(min(range(1, max(map(len, groups)) + 1), key=cost))
    width = max(widths)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    starts, ends = torch.zeros(len(sequences), dtype=torch.long), torch.zeros(len(sequences), dtype=torch.long)
    for place, members in enumerate(rows):
        at = first = prompt_lengths[members[0]] - 1
        ids[place, :first] = torch.tensor(sequences[members[0]][:first])
        positions[place, :first] = torch.arange(first)
        for number, member in enumerate(members, start=1):
            span = slice(at, at + tails[member])
            ids[place, span] = torch.tensor(sequences[member][first:])
            positions[place, span] = torch.arange(first, first + tails[member])
            segments[place, span] = number
            starts[member], ends[member] = place * width + at, place * width + span.stop - 1
            at = span.stop
        segments[place, at:] = len(members) + 1
        positions[place, at:] = torch.arange(width - at)
    attended = torch.arange(width) < torch.tensor(widths)[:, None]
    parts = [part.to(device) for part in (ids, positions, segments, attended, starts, ends)]
    return PackedRows(*parts, shared=len(rows) < len(sequences))  # type: ignore[misc, arg-type]


def same_prompts(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Iterable[list[int]]:
    """Indices of the sequences that start with the same prompt, group by group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (sequence, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        groups.setdefault(tuple(sequence[:length]), []).append(row)
    return groups.values()


def shared_batches(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], token_budget: int
) -> list[list[int]]:
    """
    Indices in batches for [`pack_rows`], each at most `token_budget` packed tokens with its padding; groups stay whole
    where they fit.

    >>> shared_batches([[5, 6, 1], [7, 8, 2, 2], [5, 6, 3, 3], [9]], [2, 2, 2, 1], token_budget=12)
    [[0, 2, 1], [3]]
    """
    pieces: list[tuple[int, list[int]]] = []  # packed tokens, rows
    for group in same_prompts(sequences, prompt_lengths):
        width = first = prompt_lengths[group[0]] - 1
        piece: list[int] = []
        for row in group:
            tail = len(sequences[row]) - prompt_lengths[row] + 1
            if piece and width + tail > token_budget:
                pieces.append((width, piece))
                width, piece = first, []
            width, piece = width + tail, [*piece, row]
        pieces.append((width, piece))
    batches: list[list[list[int]]] = []
    widest = 0
    for width, piece in sorted(pieces, key=lambda piece: -piece[0]):
        if batches and (len(batches[-1]) + 1) * widest <= token_budget:
            batches[-1].append(piece)
        else:
            batches.append([piece])
            widest = width
    return [[row for piece in batch for row in piece] for batch in batches]


def attention_masks(
    model: PreTrainedModel, segments: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Who sees whom in packed rows: earlier tokens of the prompt and of one's own segment.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Says what it takes: one mask, or one a kind of layer; additive under eager attention.
        segments, positions (`torch.Tensor` of shape `(groups, length)`):
            Of [`PackedRows`].

    Returns:
        `torch.Tensor` of shape `(groups, 1, length, length)`, or a dict of them by kind of layer.
    """
    config = model.config.get_text_config()
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    own = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (groups, query, key)
    full = (own & causal)[:, None]

    def formatted(mask: torch.Tensor) -> torch.Tensor:
        if config._attn_implementation != "eager":
            return mask
        dtype = model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    near = full
    if window is not None:
        near = full & (positions[:, :, None] - positions[:, None, :] < window)[:, None]
    if not kinds:
        return formatted(near)
    masks = {"full_attention": full, "sliding_attention": near}
    return {kind: formatted(masks[kind]) for kind in set(kinds)}


def shares_prompts(model: PreTrainedModel) -> bool:
    """
    Whether a causal model computes packed rows as it computes plain ones: it takes positions and an attention mask of
    its own, which recurrent and alibi models do not, nor flash attention. Tried once a model, on a few tokens.
    """
    if getattr(model, "_shares_prompts", None) is None:
        reason = _why_not_shared(model)
        model._shares_prompts = reason is None
        if reason is not None:
            logger.warning("Every rollout computes its own prompt (`--shared_prompt false`), since %s.", reason)
    return model._shares_prompts


def _why_not_shared(model: PreTrainedModel) -> str | None:
    config, name = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [])  # GPT-Neo's
    kinds -= {"full_attention", "sliding_attention", "global"}
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters or getattr(config, "alibi", False):
        return f"{name} takes no positions"
    if kinds or getattr(model, "_is_stateful", False):
        return f"{name} has layers of another kind than attention over all or the last tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no mask of its own (sdpa does)"
    modes = [(module, module.training) for module in model.modules()]
    device, ids = model.get_input_embeddings().weight.device, [1, 2, 3, 4, 5, 6, 7, 3, 2]
    states = []
    try:
        model.train(any(map(is_packed, model.parameters())))  # an evaluation would pack a 4-bit base anew on a CPU
        with torch.no_grad():
            for hidden_size in (None, 1_000_000):
                packed = pack_rows([ids[:7], ids[:5] + ids[7:]], [5, 5], 0, device, hidden_size)
                hidden = model.base_model(**packed.model_inputs(model), use_cache=False).last_hidden_state
                read = (packed.starts[:, None] + torch.arange(3, device=device)).flatten()
                states.append(hidden.flatten(0, 1)[read.to(hidden.device)].float())
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        return f"{name} refuses packed rows ({' '.join(str(error).split())[:120]})"
    finally:
        for module, mode in modes:
            module.training = mode
    difference = (states[0] - states[1]).norm() / states[0].norm()
    if difference <= (TOLERANCE if hidden.dtype == torch.float32 else HALF_TOLERANCE):
        return None
    return f"{name}'s packed rows differ from plain ones by {difference:.1e}"
