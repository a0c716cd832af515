"""Exact ranks, probabilities and best items over a large catalogue, against a bare float32 product of its chunks."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.timing import compare

from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError
from r2ec_trl.items.scoring import chunk_of, normalise, target_rank_and_logprob, top_k


@dataclass
class ScoreArguments:
    """Sizes of the case."""

    states: int = field(default=64, metadata={"help": "B, answer states scored at once."})
    num_items: int = field(default=1_000_000, metadata={"help": "N, size of the catalogue."})
    hidden_size: int = field(default=256, metadata={"help": "d, size of a state."})
    k: int = field(default=10, metadata={"help": "Best items asked for."})
    rounds: int = field(default=5, metadata={"help": "Rounds of A B B A."})


def run(words: Sequence[str]) -> dict[str, Any]:
    """Parity with float64, then the ratios, and the memory taken beside the table."""
    (args,) = parse((ScoreArguments,), words, description=__doc__)
    draw = torch.Generator().manual_seed(0)
    states = normalise(torch.randn(args.states, args.hidden_size, generator=draw), "cosine")
    rows = torch.randn(args.num_items, args.hidden_size, generator=draw)
    rows /= rows.norm(dim=1, keepdim=True)
    targets = torch.randint(args.num_items, (args.states,), generator=draw)
    rows[-1], rows[-2] = rows[targets[0]], rows[targets[1]] + 1e-7  # a tie and a near one
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states, rows, targets = states.to(device), rows.to(device), targets.to(device)
    chunk_size = chunk_of(states, rows)

    def product() -> None:
        for start in range(0, len(rows), chunk_size):
            states @ rows[start : start + chunk_size].T

    def rank() -> Any:
        return target_rank_and_logprob(states, rows, targets, temperature=0.02)

    def best() -> Any:
        return top_k(states, rows, args.k)

    product()
    before = _peak()
    rank(), best()
    memory = round(_peak() - before, 1) if device == "cpu" else None  # above what the bare product took
    ranks, logprobs, best_items = float64_twin(states, rows, targets, args.k)

    def check_rank() -> None:
        found = rank()
        if not (torch.equal(found.rank, ranks) and torch.allclose(found.logprob, logprobs, atol=1e-4)):
            raise UserError("Ranks or probabilities differ from those of a float64 product; no timing is given.")

    def check_best() -> None:
        if not torch.equal(best()[1], best_items):
            raise UserError("The best items differ from those of a float64 product; no timing is given.")

    size = f"{args.states} states x {args.num_items:,} items x {args.hidden_size}"
    shared = {"against": "bare float32 product", "rounds": args.rounds, "formula": 1.0, "bar": 1.3}
    return {
        "comparisons": [
            compare(rank, product, what=f"rank and probability, {size}", parity=check_rank, **shared),
            compare(best, product, what=f"top {args.k}, {size}", parity=check_best, **shared),
        ],
        "chunk_size": chunk_size,
        "extra_memory_mib": memory,
    }


def float64_twin(
    states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranks, log-probabilities and best items, one state after the other, each from a whole float64 product."""
    ranks, logprobs, best = [], [], []
    for state, target in zip(states, targets.tolist(), strict=True):
        parts = [(tile.double() @ state.double()).float() for tile in rows.split(2**16)]
        scores = torch.cat(parts)
        ranks.append((scores >= scores[target]).sum())
        logprobs.append((scores.double() / 0.02).log_softmax(0)[target].float())
        best.append(scores.sort(descending=True, stable=True).indices[:k])
    return torch.stack(ranks), torch.stack(logprobs), torch.stack(best)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
