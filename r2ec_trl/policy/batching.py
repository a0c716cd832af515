"""Batches by length and token budget: the one way forwards without gradient are batched; the longest sequence."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from r2ec_trl.errors import UserError

FEW_TOKENS = 512  # a batch of fewer costs as much as one of these


def length_sorted_batches(
    lengths: Sequence[int], token_budget: int, most_waste: float | None = None
) -> list[list[int]]:
    """
    Indices in batches of similar length, longest first, each at most `token_budget` tokens with its padding.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence.
        token_budget (`int`):
            Rows times longest row of a batch; a sequence longer than it goes alone.
        most_waste (`float`, *optional*):
            Tokens of a batch with its padding, over those without: one that has at least 512 ends before it is more.

    >>> length_sorted_batches([3, 9, 4, 8], token_budget=18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    tokens = 0  # of the newest batch
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else token_budget + 1
        full = most_waste is not None and padded > max(most_waste * (tokens + lengths[index]), FEW_TOKENS)
        if padded > token_budget or full:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model can tell apart, scaled ones included; `None` where there is no end to them."""
    text = config.get_text_config()
    given = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    scaled = int(factor * (original or given)) if isinstance(factor, (int, float)) and given else 0
    return max(given, scaled) if isinstance(given, int) else None


def check_length(config: PreTrainedConfig | None, tokens: int, what: str, cure: str) -> None:
    """Raise [`UserError`] for sequences longer than the model's positions."""
    limit = positions_of(config) if config is not None else None
    if limit is not None and tokens > limit:
        raise UserError(f"{what} take up to {tokens:,} tokens, but the model has {limit:,} positions; lower {cure}.")
