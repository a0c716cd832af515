"""Batches by length, by hand."""

from r2ec_trl.policy.batching import length_sorted_batches


def test_by_hand():
    """Longest first; two of 9 and 8 tokens take 18 with their padding, three would take 27."""
    assert length_sorted_batches([3, 9, 4, 8], token_budget=18) == [[1, 3], [2, 0]]
    assert length_sorted_batches([3, 9, 4, 8], token_budget=17) == [[1], [3, 2], [0]]
    assert length_sorted_batches([50, 1], token_budget=10) == [[0], [1]]  # too long: alone
    assert length_sorted_batches([], token_budget=10) == []
