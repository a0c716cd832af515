"""Batches by length, by hand."""

import random

import pytest
from transformers import Qwen2Config

from r2ec_trl.errors import UserError
from r2ec_trl.policy.batching import check_length, length_sorted_batches


def test_by_hand():
    """Longest first; two of 9 and 8 tokens take 18 with their padding, three would take 27."""
    assert length_sorted_batches([3, 9, 4, 8], token_budget=18) == [[1, 3], [2, 0]]
    assert length_sorted_batches([3, 9, 4, 8], token_budget=17) == [[1], [3, 2], [0]]
    assert length_sorted_batches([50, 1], token_budget=10) == [[0], [1]]  # too long: alone
    assert length_sorted_batches([], token_budget=10) == []


@pytest.mark.parametrize("seed", range(5))
def test_paddings_are_few_in_a_catalogue_of_any_lengths(seed):
    """Lengths spread as product texts are: 1,000 items take less than 5 % of padding, whatever fits into a forward."""
    draw = random.Random(seed)
    lengths = [max(8, round(draw.lognormvariate(4.6, 0.5))) for _ in range(1000)]
    batches = length_sorted_batches(lengths, 16_384, 1.04)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    padded = [len(batch) * lengths[batch[0]] for batch in batches]
    assert sum(padded) < 1.05 * sum(lengths) and max(padded) <= 16_384
    assert len(batches) < 36  # of 110,000 tokens
    assert length_sorted_batches([30, 8, 60, 9], 16_384, 1.04) == [[2, 0, 3, 1]]  # too few to split


def test_positions_that_are_scaled_count():
    """YaRN's factor of 4 makes 64 positions of 16; without it 17 tokens are too many."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
    check_length(Qwen2Config(max_position_embeddings=16, rope_parameters=yarn), 64, "Prompts", "a limit")
    for scaled, tokens in ((yarn, 65), (None, 17)):
        with pytest.raises(UserError, match=f"Prompts take up to {tokens} tokens, but the model has {tokens - 1} pos"):
            config = Qwen2Config(max_position_embeddings=16, rope_parameters=scaled)
            check_length(config, tokens, "Prompts", "a limit")
