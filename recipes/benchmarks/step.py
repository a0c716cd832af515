"""
An optimizer step on replayed rollouts: RecPO, recommendation included, against stock TRL's GRPOTrainer, against its
own flat twin (`--shared_prompt false`, the candidates encoded in every micro-step), or against another checkout.

    python recipes/benchmark.py --case step                                       # the two settings of the README
    python recipes/benchmark.py --case step --prompt_tokens 500 --users 24 --generations 4 --micro_batch 4
    python recipes/benchmark.py --case step --against ../an/older/checkout
    python recipes/benchmark.py --case step --shape qwen2.5-3b --help             # whole steps, on a GPU

A 4.7 M-parameter Llama, LoRA of rank 4, float32, one thread, each side in a process of its own with its own defaults.
Generation is left out: both sides get the same rollouts. Parity: the gradient of the token term (of both terms against
the twin) before anything is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.timing import compare

from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError

_RECIPES = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # by which gradients may differ, of the larger one's norm


@dataclass
class StepArguments:
    """Sizes of the case."""

    prompt_tokens: int | None = field(default=None, metadata={"help": "P, tokens of a user prompt."})
    completion_tokens: int = field(default=64, metadata={"help": "R, tokens of a rollout (about)."})
    generations: int = field(default=4, metadata={"help": "G, rollouts a user."})
    users: int = field(default=4, metadata={"help": "Users an optimizer step, each with another target."})
    micro_batch: int = field(default=8, metadata={"help": "Rollouts a forward and backward pass."})
    item_tokens: int = field(default=32, metadata={"help": "Tokens of an item prompt (about)."})
    num_items: int = field(default=100, metadata={"help": "N, size of the catalogue."})
    rounds: int = field(default=3, metadata={"help": "Rounds of A B B A."})
    against: str | None = field(default=None, metadata={"help": "Root of another checkout: RecPO there is theirs."})


class Side:
    """A trainer in a process of its own; a call runs one optimizer step there and returns its (CPU, wall) seconds."""

    def __init__(
        self,
        kind: str,
        args: Any,
        checkout: Path,
        script: Path = Path(__file__).with_name("replayed.py"),
        python: str = sys.executable,
        **settings: Any,
    ):
        environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{_RECIPES}", "OMP_NUM_THREADS": "1"}
        words = json.dumps({"kind": kind, "settings": settings, **asdict(args)})
        self.process = subprocess.Popen(
            [python, str(script), words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.peak = 0.0

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer to `step` or `gradient`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise UserError("A side of the benchmark has ended; what it wrote is above.")

    def __call__(self) -> tuple[float, float]:
        answer = self.ask("step")
        self.peak = max(self.peak, answer["peak_mib"])
        return answer["cpu"], answer["wall"]

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def run(words: Sequence[str]) -> dict[str, Any]:
    """The comparisons, from the command line; `--shape` measures whole steps instead."""
    if any(word.split("=")[0] == "--shape" for word in words):
        from benchmarks import whole_step

        return whole_step.run(list(words))
    (args,) = parse((StepArguments,), list(words), description=__doc__)
    settings = [(args, None)]
    if args.prompt_tokens is None:
        short = replace(args, prompt_tokens=300, completion_tokens=64, generations=4, users=4, micro_batch=8)
        long = replace(args, prompt_tokens=800, completion_tokens=128, generations=8, users=2, micro_batch=8)
        settings = [(short, 0.60), (long, 0.45)]
    comparisons = []
    for sizes, bar in settings:
        if args.against is not None:
            comparisons.append(against(sizes, "older", None, checkout=Path(args.against).resolve()))
            continue
        comparisons += [against(sizes, "stock", bar), against(sizes, "flat", None, shared_prompt=False)]
    return {"comparisons": comparisons}


def against(args: StepArguments, kind: str, bar: float | None, checkout: Path | None = None, **settings: Any) -> dict:
    """One comparison, with the peak memory of a step on either side."""
    here = Path(__file__).resolve().parents[2]
    ours, theirs = Side("recpo", args, here), Side(kind, args, checkout or here, **settings)
    both_terms = kind != "stock"

    def parity() -> None:
        question = "gradient of both terms" if both_terms else "gradient of the tokens"
        one, other = ours.ask(question), theirs.ask(question)
        norm = max(sum(x * x for x in side) ** 0.5 for side in (one, other))
        difference = sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) ** 0.5
        if not difference <= TOLERANCE * norm:
            raise UserError(f"Nothing is timed: the gradients differ by {difference:.1e}, with norm {norm:.1e}.")
        ours(), theirs()  # warm

    p, r, g = args.prompt_tokens or 0, args.completion_tokens, args.generations
    names = {"stock": "TRL's GRPOTrainer", "flat": "a row a rollout, items every micro-step", "older": args.against}
    packed = (p + g * (r + 1)) / (g * (p + r))  # tokens of a pass; units: ours 1 + 2, checkpointed training 3
    formula = packed * (3 / 3 if kind == "stock" else 1)
    try:
        result = compare(
            ours,
            theirs,
            what=f"RecPO step, {args.users} users, P {p}, R {r}, G {g}",
            against=names[kind] or "",
            parity=parity,
            rounds=args.rounds,
            formula=formula,
            bar=bar,
        )
    finally:
        ours.end()
        theirs.end()
    peaks = {"ours_peak_mib": round(ours.peak, 1), "theirs_peak_mib": round(theirs.peak, 1)}
    return {**result, **peaks, "peak_ratio": round(ours.peak / max(theirs.peak, 1e-9), 3)}
