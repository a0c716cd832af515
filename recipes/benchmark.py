"""
Measure one part of the library against its plain twin; the last line is one JSON object.

    python recipes/benchmark.py --case data                    # raw file to dataset folder, 1 M rows and 10 M rows
    python recipes/benchmark.py --case data --help             # the flags of a case

A case is a module `recipes/benchmarks/NAME.py` with `run(words) -> dict`: add the file, and `--case NAME` finds it. It
checks that both ways give the same before it times them, and reports ratios.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks.timing import header
from rich.console import Console

from r2ec_trl.cli.parsing import did_you_mean, run
from r2ec_trl.errors import UserError

_SHARED = ("timing",)


def main() -> None:
    words = sys.argv[1:]
    cases = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in _SHARED]
    if words[:1] != ["--case"] or len(words) < 2:
        raise UserError(f"Say --case NAME first; the cases are {', '.join(cases)}.")
    name, rest = words[1], words[2:]
    if name not in cases:
        raise UserError(f"--case {name!r} is unknown{did_you_mean(name, cases)}; the cases are {', '.join(cases)}.")
    where = header()
    Console(stderr=True).print(where)
    result = importlib.import_module(f"benchmarks.{name}").run(rest)
    print(json.dumps({"case": name, **result, "machine": where}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(main)
