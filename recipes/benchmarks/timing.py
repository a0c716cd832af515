"""What every case needs: a header that says where it ran, interleaved timing, and the statistics of a ratio."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

_PACKAGES = ("torch", "transformers", "trl", "datasets", "polars", "pyarrow", "numpy")


def header() -> dict[str, Any]:
    """Versions, threads and load of the machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def interleaved(fast: Callable[[], Any], slow: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """
    Time two ways of the same thing as A B B A, so that a drift of the machine falls on both.

    Args:
        fast (`Callable`):
            Ours.
        slow (`Callable`):
            The plain twin.
        rounds (`int`):
            Rounds of A B B A; each gives two ratios.

    Returns:
        `dict`: median seconds of each, the median ratio slow / fast, its spread and a 95 % bootstrap interval.
    """
    times: dict[str, list[float]] = {"fast": [], "slow": []}
    for _ in range(rounds):
        for name in ("fast", "slow", "slow", "fast"):
            gc.collect()
            start = time.perf_counter()
            (fast if name == "fast" else slow)()
            times[name].append(time.perf_counter() - start)
    ratios = np.array(times["slow"]) / np.array(times["fast"])
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {
        "fast_seconds": round(float(np.median(times["fast"])), 3),
        "slow_seconds": round(float(np.median(times["slow"])), 3),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_spread": [round(float(ratios.min()), 2), round(float(ratios.max()), 2)],
        "ratio_interval": [round(float(low), 2), round(float(high), 2)],
        "runs_of_each": len(ratios),
    }
