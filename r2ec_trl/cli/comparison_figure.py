"""A comparison as a picture: each difference with its interval, a line a system."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from r2ec_trl.cli.terminal import printable
from r2ec_trl.metrics import PERCENT


def comparison_figure(comparison: Mapping[str, Any], reference: str) -> Figure:
    """Differences of [`~r2ec_trl.evaluation.comparison.compare_runs`] from `reference`, a panel a mask and metric."""
    systems = comparison["systems"]
    panels = [(mask, metric) for mask, figures in next(iter(systems.values())).items() for metric in figures]
    figure = Figure(figsize=(3.2 + 3.2 * len(panels), 1.6 + 0.35 * len(systems)), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (mask, metric) in zip(every, panels, strict=True):
        for place, figures in enumerate(systems.values()):
            one = figures[mask][metric]
            error = [[max(0.0, one["difference"] - one["low"])], [max(0.0, one["high"] - one["difference"])]]
            decided = comparison["users"] > 1 and (one["low"] > 0 or one["high"] < 0)
            axes.errorbar(one["difference"], place, xerr=error, fmt="o", capsize=3, color="C0" if decided else "C7")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{metric}, {mask}")
        axes.grid(axis="x", alpha=0.3)
    every[0].set_yticks(range(len(systems)), [printable(name).replace("$", r"\$") for name in systems])
    every[0].set_ylim(len(systems) - 0.5, -0.5)
    figure.supxlabel(f"difference from {printable(reference)}, {PERCENT} interval".replace("$", r"\$"))
    return figure
