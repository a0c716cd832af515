"""A table in slices, on three processes, against the whole one: ranks, probabilities and best items are the same."""

import os

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import share_encoding
from r2ec_trl.items.scoring import exclusion_matrix, target_rank_and_logprob, top_k
from r2ec_trl.items.sliced_table import SlicedTable
from r2ec_trl.items.table import ItemTable

pytestmark = pytest.mark.distributed

PROCESSES, ITEMS, SIZE = 3, 20, 4  # slices of 7, 7 and 6 rows


def tied_vectors(count: int, seed: int) -> torch.Tensor:
    """Small integers: many products are equal."""
    return torch.randint(-2, 3, (count, SIZE), generator=torch.Generator().manual_seed(seed)).float()


def encode(sequences):
    """The item's row, told by its only token."""
    return tied_vectors(ITEMS, 0)[[ids[0] for ids in sequences]]


def compare(process: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(PROCESSES))
    accelerator = Accelerator(cpu=True)
    parts = ([f"i{row}" for row in range(ITEMS)], [[row] for row in range(ITEMS)], "dot")
    whole, sliced = ItemTable(*parts), SlicedTable(*parts, accelerator=accelerator)
    whole.refresh(share_encoding(encode, accelerator, whole))
    sliced.refresh(share_encoding(encode, accelerator, sliced))
    assert torch.equal(whole.rows, tied_vectors(ITEMS, 0))
    assert len(sliced._rows) == len(range(process, ITEMS, PROCESSES))

    with pytest.raises(UserError, match="is not read from a folder"):
        sliced.load("a folder that an unsliced run wrote")

    changed = [19, 3, 4, 3]
    for table in (whole, sliced):
        table.refresh(share_encoding(lambda sequences: encode(sequences) + 1, accelerator, table), changed[:3])
    assert torch.equal(sliced.take(changed), whole.rows[changed])
    for table in (whole, sliced):
        table.put([0, 11], torch.full((2, SIZE), 2.0))
    assert torch.equal(sliced.take(range(ITEMS)), whole.rows)
    gathered = sliced.whole()
    assert (gathered is None) == (process > 0) and (gathered is None or torch.equal(gathered.rows, whole.rows))

    count = (5, 1, 8)[process]  # each process has its own users, and as many as it likes
    states, targets = tied_vectors(count, 10 + process), torch.arange(count) * 2 + process
    states[0] = torch.nan if process == 2 else states[0]
    histories = [[row % ITEMS, (3 * row + 1) % ITEMS][: 1 + process % 2] for row in range(count)]
    histories[0] = [int(targets[0])]  # a repeat
    for excluded in (None, exclusion_matrix(histories)):
        for keep_target in (True, False):
            options = {"temperature": 0.5, "excluded": excluded, "keep_target": keep_target}
            ours, theirs = sliced.rank(states, targets, **options), whole.rank(states, targets, **options)
            assert (
                theirs.rank.tolist() == target_rank_and_logprob(states, whole.rows, targets, **options).rank.tolist()
            )
            assert ours.rank.tolist() == theirs.rank.tolist()
            known = ~states.isnan().any(dim=1)
            assert torch.allclose(ours.logprob[known], theirs.logprob[known], atol=1e-6)
            assert torch.equal(ours.score[known], theirs.score[known])
        for k in (1, 6, 50):
            scores, indices = sliced.best(states, k, excluded=excluded)
            expected_scores, expected = top_k(states, whole.rows, k, excluded=excluded)
            assert indices[known].tolist() == expected[known].tolist()
            assert torch.equal(scores[known], expected_scores[known])
    accelerator.end_training()


def test_three_slices_give_what_one_table_gives():
    from test_distributed import free_port

    torch.multiprocessing.spawn(compare, args=(free_port(),), nprocs=PROCESSES)
