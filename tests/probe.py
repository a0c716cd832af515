"""
Malformed inputs by the hundred: each gives a right result or one sentence that names place and cure, in bounded time,
and leaves nothing half written.

A room registers its inputs with [`inputs`]; `python tests/probe.py [ROOM]` tries them and prints the counts, as
tests/test_probe.py does (slow).
"""

import contextlib
import io
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from r2ec_trl.errors import UserError

SECONDS = 20.0  # for one input
ROOMS = ("probe_data",)  # modules of tests/ that register inputs
# From the room's name to what yields (name, attempt): `attempt(folder)` tries one input in an empty folder, asserts
# that the result is right and writes results below `folder / "out"` alone.
REGISTRY: dict[str, Callable[[], Iterator[tuple[str, Callable[[Path], object]]]]] = {}


def inputs(room: str) -> Callable:
    """Register a generator of inputs: `@inputs("data")`."""
    return lambda generate: REGISTRY.setdefault(room, generate)


def attempt(run: Callable[[Path], object]) -> tuple[str, str]:
    """What became of one input: "right", "refused", or "broke" with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder, "out"), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                run(Path(folder))
                outcome, detail = "right", ""
            except UserError as error:
                outcome, detail = "refused", str(error)
            except BaseException:
                return "broke", traceback.format_exc(limit=-3)
        if outcome == "refused":
            if "\n" in detail or not any(mark in detail for mark in (": ", "; ", ", or ")):
                return "broke", f"no sentence with a cure: {detail!r}"
            if folder not in detail and not re.search(r"--\w|\w\.\w|/", detail):
                return "broke", f"no place is named: {detail!r}"
            if out.exists() and list(out.iterdir()):
                return "broke", f"left behind: {[path.name for path in out.iterdir()]} after {detail!r}"
        if time.monotonic() - start > SECONDS:
            return "broke", f"took {time.monotonic() - start:.0f} s"
        return outcome, detail


def probe(room: str | None = None, show: bool = False) -> tuple[Counter, list[str]]:
    """Try the inputs of a room, or of all; returns counts and the failures."""
    for module in ROOMS:
        import_module(module)
    counts: Counter = Counter()
    failures = []
    for name, generate in REGISTRY.items():
        for what, run in generate() if room in (None, name) else ():
            outcome, detail = attempt(run)
            counts[f"{name}: {outcome}"] += 1
            failures += [f"{name}, {what}: {detail}"] if outcome == "broke" else []
            if show:
                print(f"{outcome:8} {name}, {what}: {detail}")
    return counts, failures


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from probe import probe as run_probe  # the module that the rooms register with, not this script

    found, wrong = run_probe(*sys.argv[1:2], show="-v" in sys.argv[2:])
    print(*wrong, *sorted(f"{key} {count}" for key, count in found.items()), sep="\n")
    sys.exit(bool(wrong))
