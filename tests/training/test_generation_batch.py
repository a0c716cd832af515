"""GenerationBatch: what follows from its fields."""

import dataclasses

import pytest
import torch

from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.generation_batch import GenerationBatch, whole_groups, without_rows


def test_sequences_and_positions_follow_from_the_fields():
    """Targets 7, 2, 7 among the candidates 2, 5, 7 (5 is another process's) stand at 2, 0, 2."""
    rollouts = [Rollout([3, 4], [1, 1], True, False, False) for _ in range(3)]
    empty = torch.empty(0)
    batch = GenerationBatch(
        [[1], [1], [2, 2]], rollouts, torch.tensor([7, 2, 7]), [2, 5, 7], empty, empty, None, empty
    )
    assert batch.sequences == [[1, 3, 4], [1, 3, 4], [2, 2, 3, 4]]
    assert batch.positions.tolist() == [2, 0, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.candidates = [1]


def test_rows_left_out_leave_one():
    batch = {"a": torch.tensor([[1], [2]]), "b": ["x", "y"], "n": torch.tensor(3.0), "none": None}
    assert without_rows(batch, torch.tensor([False, False])) is batch
    left = without_rows(batch, torch.tensor([True, False]))
    assert (left["a"].tolist(), left["b"], left["n"].item(), left["none"]) == ([[2]], ["y"], 3.0, None)
    assert without_rows(batch, torch.tensor([True, True]))["b"] == ["x"]


def test_groups_stand_together_in_the_order_of_the_shuffle():
    """Rows d b | a c of the groups 9 3 | 3 9: 9 came first, so d c | b a; scalars and nothing stay as they are."""
    shuffled = [
        {"group": torch.tensor([9, 3]), "text": ["d", "b"], "n": torch.tensor(3.0), "none": None},
        {"group": torch.tensor([3, 9]), "text": ["a", "c"], "n": torch.tensor(3.0), "none": None},
    ]
    whole = whole_groups(shuffled)
    assert [(part["group"].tolist(), list(part["text"])) for part in whole] == [
        ([9, 9], ["d", "c"]),
        ([3, 3], ["b", "a"]),
    ]
    assert [(part["n"].item(), part["none"]) for part in whole] == [(3.0, None)] * 2
