"""Batches by length and token budget: the one way forwards without gradient are batched."""

from collections.abc import Sequence


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """
    Indices in batches of similar length, longest first, each at most `token_budget` tokens with its padding.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence.
        token_budget (`int`):
            Rows times longest row of a batch; a sequence longer than it goes alone.

    >>> length_sorted_batches([3, 9, 4, 8], token_budget=18)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
