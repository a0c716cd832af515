"""
Measure one part of the library against its plain twin, or all of them; the last line is one JSON object.

    python recipes/benchmark.py --case score                   # exact ranks against a bare float32 product
    python recipes/benchmark.py --case data --help             # the flags of a case
    python recipes/benchmark.py --case all --output FOLDER     # all but serve: FOLDER/benchmark.md, .png, .json

A case is a module `recipes/benchmarks/NAME.py` with `run(words) -> dict`: add the file, and `--case NAME` finds it. It
makes its inputs once and reports `comparisons`, each by [`benchmarks.timing.compare`]: nothing is timed before both
ways gave the same.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.timing import header
from rich.console import Console

from r2ec_trl.cli.parsing import did_you_mean, run
from r2ec_trl.cli.run_start import check_writable
from r2ec_trl.errors import UserError
from r2ec_trl.files import write_text

_BY_HAND = ("serve",)  # loads a server for minutes, and compares nothing
_SHARED = ("timing", "replayed", "sampled", "whole_step")


def main() -> None:
    words = sys.argv[1:]
    cases = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in _SHARED]
    if words[:1] != ["--case"] or len(words) < 2:
        raise UserError(f"Say --case NAME first; the cases are {', '.join(cases)}, all.")
    name, rest = words[1], words[2:]
    if name not in [*cases, "all"]:
        raise UserError(
            f"--case {name!r} is unknown{did_you_mean(name, cases)}; the cases are {', '.join(cases)}, all."
        )
    where = header()
    Console(stderr=True).print(where)
    result = run_all(cases, rest, where) if name == "all" else importlib.import_module(f"benchmarks.{name}").run(rest)
    print(json.dumps({"case": name, **result, "machine": where}))


def run_all(cases: list[str], words: list[str], where: dict[str, Any]) -> dict[str, Any]:
    """Every case but [`_BY_HAND`] with its defaults, in a process each; one that fails is named, the others go on."""
    cases = sorted((case for case in cases if case not in _BY_HAND), key="data".__eq__)  # the longest last
    if words[:1] != ["--output"] or len(words) not in (2, 4) or words[2:3] not in ([], ["--rounds"]):
        raise UserError("--case all takes --output FOLDER, where table and picture go, and then maybe --rounds N.")
    folder = check_writable(words[1])
    results: dict[str, Any] = {}
    rows: list[tuple[str, dict[str, Any]]] = []
    for case in cases:
        command = [sys.executable, __file__, "--case", case, *words[2:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            continue
        results[case] = json.loads(done.stdout.splitlines()[-1])
        rows += [(case, row) for row in results[case]["comparisons"]]
        write_text(folder / "benchmark.md", table(rows, where))
        write_text(folder / "benchmark.json", json.dumps(results, indent=1) + "\n")
        draw(rows, folder / "benchmark.png")
    return {"failed": [case for case in cases if case not in results], "comparisons": [row for _, row in rows]}


def table(rows: list[tuple[str, dict[str, Any]]], where: dict[str, Any]) -> str:
    """The comparisons as Markdown, under a line that says where they ran."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['gpu'] or where['processor']}, {where['cpus']} CPUs, {where['threads']} threads; {versions}.",
        "",
        "| case | ours | against | CPU s | ours / theirs [95 %] | bar | measured / formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, row in rows:
        low, high = row["interval"]
        seconds = f"{row['ours_cpu_seconds']:.3g} / {row['theirs_cpu_seconds']:.3g}"
        bar, share = (row[name] if row[name] is not None else "–" for name in ("bar", "measured_over_formula"))
        lines.append(
            f"| {case} | {row['what']} | {row['against']} | {seconds} | {row['ratio']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {bar} | {share} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """One bar a comparison, its interval on it, the figure not to be exceeded as a mark, and theirs as a line at 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (case, row) in enumerate(reversed(rows)):
        low, high = row["interval"]
        around = [[row["ratio"] - low], [high - row["ratio"]]]
        axes.barh(place, row["ratio"], xerr=around, color="#4c78a8", capsize=3)
        if row["bar"] is not None:
            axes.plot([row["bar"]] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=3)
    axes.set_yticks(range(len(rows)), [f"{case}: {row['what']}\nagainst {row['against']}" for case, row in rows[::-1]])
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("time, ours / theirs (red: not to be exceeded)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    run(main)
