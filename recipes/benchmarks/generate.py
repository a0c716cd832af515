"""
Rollouts of the same prompts: RecPO's trainer against transformers' `generate`, another checkout or vLLM's CPU backend.

    python recipes/benchmark.py --case generate                              # random weights of SmolLM2-135M's shape
    python recipes/benchmark.py --case generate --model FOLDER --against ../an/older/checkout
    python recipes/benchmark.py --case generate --model FOLDER --vllm_python ../an/environment/bin/python

LoRA of rank 4 on all layers, float32, one thread, each side in a process of its own. Parity: the greedy tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.step import Side
from benchmarks.timing import compare

from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError


@dataclass
class GenerateArguments:
    """Sizes of the case."""

    model: str | None = field(default=None, metadata={"help": "Folder of a model; without one, random weights."})
    users: int = field(default=4, metadata={"help": "Users a generation batch, each with another prompt."})
    generations: int = field(default=6, metadata={"help": "G, rollouts a user."})
    prompt_tokens: int = field(default=110, metadata={"help": "P, tokens of a user prompt (10 fewer to 5 more)."})
    new_tokens: int = field(default=24, metadata={"help": "Tokens of every rollout."})
    rounds: int = field(default=3, metadata={"help": "Rounds of A B B A."})
    against: str | None = field(default=None, metadata={"help": "Root of another checkout: RecPO there is theirs."})
    vllm_python: str | None = field(
        default=None, metadata={"help": "Python of an environment with vLLM: its CPU backend is theirs."}
    )


def run(words: Sequence[str]) -> dict[str, Any]:
    """The comparison, from the command line."""
    (args,) = parse((GenerateArguments,), list(words), description=__doc__)
    here, script = Path(__file__).resolve().parents[2], Path(__file__).with_name("sampled.py")
    kind, name, checkout, python, bar = "transformers", "transformers' generate", here, sys.executable, None
    if args.against is not None:
        kind, name, checkout, bar = "older", args.against, Path(args.against).resolve(), 0.28
    if args.vllm_python is not None:
        if args.model is None:
            raise UserError("vLLM reads a model from a folder; add `--model FOLDER`.")
        kind, name, python = "vllm", "vLLM's CPU backend", args.vllm_python
    ours = Side("recpo", args, here, script)
    theirs = Side(kind, args, checkout, script, python)

    def parity() -> None:
        pairs = [pair for rows in zip(ours.ask("greedy"), theirs.ask("greedy"), strict=True) for pair in zip(*rows)]
        share = sum(one == other for one, other in pairs) / len(pairs)
        if share < 0.95:  # after a tie that rounding broke, the rest of a row is another
            raise UserError(f"Nothing is timed: {1 - share:.0%} of the greedy tokens differ.")

    rows = args.users * args.generations
    what = f"{rows} rollouts of {args.new_tokens} tokens, P {args.prompt_tokens}, G {args.generations}"
    try:
        return {
            "comparisons": [compare(ours, theirs, what=what, against=name, parity=parity, rounds=args.rounds, bar=bar)]
        }
    finally:
        ours.end()
        theirs.end()
