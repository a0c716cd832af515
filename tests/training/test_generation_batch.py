"""GenerationBatch: what follows from its fields."""

import dataclasses

import pytest
import torch

from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.generation_batch import GenerationBatch, without_rows


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
