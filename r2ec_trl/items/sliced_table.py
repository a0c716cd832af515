"""An item table of which each process holds a slice, for catalogues whose rows do not fit on one device."""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from r2ec_trl.errors import UserError
from r2ec_trl.items.scoring import CatalogueScores, chunk_of, count_against, target_scores, top_k
from r2ec_trl.items.table import Encoder, ItemTable

logger = logging.getLogger(__name__)

GATHERED_ROWS = 8192  # at a time


class SlicedTable(ItemTable):
    """
    Holds row i on process i mod the number of processes, so that any run of rows is shared out evenly.

    Every method below is called by all processes together, each with its own states (as many as it likes). To rank a
    state four numbers travel beside it: its target's score, how many items are no worse, and two of the log-sum-exp.

    Args:
        item_ids, token_ids, similarity, device:
            As in [`~r2ec_trl.items.table.ItemTable`].
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes.
    """

    def __init__(self, *args: Any, accelerator: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.accelerator = accelerator
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        if self.process == 0:
            logger.warning("The item table is sliced over the processes, and not saved with checkpoints and weights.")

    @property
    def num_bytes(self) -> int:
        """0: there is nothing to save."""
        return 0

    @property
    def rows(self) -> torch.Tensor:
        """Refused: no process has them all."""
        raise UserError("Each process holds a slice of the item table; leave `--slice_table` out for this.")

    def _own(self, indices: Sequence[int]) -> list[int]:
        return [row for row in indices if row % self.processes == self.process]

    @torch.no_grad()
    def refresh(self, encoder: Encoder, indices: Sequence[int] | None = None) -> None:
        """Re-encode rows: each process those it holds. `encoder` is the process's own, not a shared one."""
        if indices is None or self._rows is None:
            own = self._own(range(len(self)))
            self._rows = self.encoded(encoder, own)
        elif own := self._own(indices):
            self.put(own, self.encoded(encoder, own))

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """Rows of any process, `(n, d)`, the same on all."""
        held = super().rows
        rows = held.new_zeros(len(indices), held.shape[1])
        mine = [position for position, row in enumerate(indices) if row % self.processes == self.process]
        rows[mine] = held[[indices[position] // self.processes for position in mine]]
        dist.all_reduce(rows)
        return rows

    def put(self, indices: Sequence[int], rows: torch.Tensor) -> None:
        """Overwrite the rows among them that this process holds."""
        mine = [position for position, row in enumerate(indices) if row % self.processes == self.process]
        super().rows[[indices[position] // self.processes for position in mine]] = rows[mine].to(self.device)

    @torch.no_grad()
    def rank(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float,
        excluded: torch.Tensor | None = None,
        keep_target: bool = True,
    ) -> CatalogueScores:
        """[`~r2ec_trl.items.scoring.target_rank_and_logprob`] over the rows of all processes."""
        held = super().rows
        excluded = targets.new_empty(len(targets), 0) if excluded is None else excluded
        same = excluded == targets[:, None]  # (B, H)
        missed = same.any(dim=1) & (not keep_target)
        if keep_target:
            excluded = excluded.masked_fill(same, -1)
        counts = self._gather_sizes(len(states), excluded.shape[1])
        states, targets = self._gather(states, 0.0), self._gather(targets, -1)
        excluded = self._gather(_widen(excluded, max(width for _, width in counts)), -1)
        chunk_size = chunk_of(states, held)
        own = self._local(targets)
        score = target_scores(states, held, own).nan_to_num(nan=-math.inf)
        dist.all_reduce(score, op=dist.ReduceOp.MAX)
        score.masked_fill_(targets < 0, 0.0)  # rows that only fill up the shorter processes' share
        count, normaliser = count_against(states, held, own, score, temperature, self._local(excluded), chunk_size)
        dist.all_reduce(count)
        largest = normaliser.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total = (normaliser - largest).exp()
        dist.all_reduce(total)
        logprob = (score.double() / temperature - largest - total.log()).float()
        mine = self._mine([rows for rows, _ in counts])
        return CatalogueScores(
            rank=count[mine].masked_fill(missed, len(self) + 1),
            logprob=logprob[mine].masked_fill(missed, -math.inf),
            score=score[mine],
        )

    @torch.no_grad()
    def best(
        self, states: torch.Tensor, k: int, *, excluded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`~r2ec_trl.items.scoring.top_k`] over the rows of all processes."""
        held = super().rows
        excluded = torch.empty(len(states), 0, dtype=torch.int64, device=held.device) if excluded is None else excluded
        counts = self._gather_sizes(len(states), excluded.shape[1])
        states = self._gather(states, 0.0)
        excluded = self._gather(_widen(excluded, max(width for _, width in counts)), -1)
        width = min(k, -(-len(self) // self.processes))
        scores, indices = top_k(states, held, width, excluded=self._local(excluded))
        indices = torch.where(indices < 0, indices, indices * self.processes + self.process)
        missing = (len(scores), width - scores.shape[1])  # a shorter slice
        scores = torch.cat([scores, scores.new_full(missing, -math.inf)], dim=1)
        indices = torch.cat([indices, indices.new_full(missing, -1)], dim=1)
        everyone = len(states)
        scores = self.accelerator.gather(scores).view(self.processes, everyone, -1).transpose(0, 1).flatten(1)
        indices = self.accelerator.gather(indices).view(self.processes, everyone, -1).transpose(0, 1).flatten(1)
        order = indices.argsort(dim=1, stable=True)  # ties: the lower index first
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
        mine = self._mine([rows for rows, _ in counts])
        order = order[mine, : min(k, len(self))]
        return scores[mine].gather(1, order), indices[mine].gather(1, order)

    def whole(self) -> ItemTable | None:
        """All rows in the main process's memory; `None` on the others."""
        chunks = []
        for start in range(0, len(self), GATHERED_ROWS):
            rows = self.take(range(start, min(start + GATHERED_ROWS, len(self))))
            if self.process == 0:
                chunks.append(rows.cpu())
        if self.process:
            return None
        return ItemTable.from_rows(self.item_ids, self.token_ids, torch.cat(chunks), self.similarity)

    def save(self, folder: str | os.PathLike) -> None:
        """Saves nothing (see the warning at the start): whoever reads the folder encodes the catalogue anew."""

    def load(self, folder: str | os.PathLike) -> None:
        """Refused: a saved table holds every row, not this process's."""
        raise UserError("A sliced item table is not read from a folder.")

    def _local(self, indices: torch.Tensor) -> torch.Tensor:
        """Positions in this process's slice; -1 for rows that others hold, and for -1."""
        own = (indices >= 0) & (indices % self.processes == self.process)
        return torch.where(own, indices // self.processes, -1)

    def _gather_sizes(self, rows: int, width: int) -> list[tuple[int, int]]:
        """(rows, width) of each process."""
        sizes = torch.tensor([[rows, width]], device=self.device)
        return [tuple(pair) for pair in self.accelerator.gather(sizes).tolist()]

    def _gather(self, tensor: torch.Tensor, pad: float) -> torch.Tensor:
        """The rows of all processes, each process's padded to as many as the longest has."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(tensor, dim=0, pad_index=pad))

    def _mine(self, rows: list[int]) -> slice:
        """Where this process's rows are in what [`_gather`] returns."""
        start = self.process * max(rows)
        return slice(start, start + rows[self.process])


def _widen(excluded: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(excluded, (0, width - excluded.shape[1]), value=-1)
