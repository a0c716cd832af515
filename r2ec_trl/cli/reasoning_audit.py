"""The reasoning audit as a table and as a picture: rendering alone, no figure is computed here."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from r2ec_trl.cli.tables import difference_cell, figure_cell
from r2ec_trl.cli.terminal import printable
from r2ec_trl.metrics import PERCENT

_DIFFERENCES = ("minus_none", "minus_full", "minus_mean")


def audit_table(audit: Mapping[str, Any], mask: str = "unmasked") -> Table:
    """A line a way to reason of [`~r2ec_trl.evaluation.reasoning_audit.audit_reasoning`]."""
    history = "history not masked" if mask == "unmasked" else "history masked"
    table = Table(title=f"Does the reasoning help? {history}", caption=f"{PERCENT} bootstrap intervals of users")
    for name in ("reasoning", "tokens", "s a user", "NDCG@10", "- none", "- full", "- mean of N"):
        table.add_column(name, justify="left" if name == "reasoning" else "right")
    for name, one in audit.items():
        changes = [difference_cell(one[mask][key], 3) if key in one[mask] else "" for key in _DIFFERENCES]
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.3g}"
        table.add_row(escape(printable(name)), f"{one['tokens']:.1f}", seconds, figure_cell(one[mask], 3), *changes)
    return table


def draw_audit(audit: Mapping[str, Any], mask: str = "unmasked") -> Figure:
    """NDCG@10 against tokens a user, with intervals; the greedy ways are joined, other models are levels."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    own = {name: one for name, one in audit.items() if one["seconds"] is not None}
    greedy = {name for name in own if name in ("none", "full") or name.startswith("first:")}
    line = sorted((audit[name]["tokens"], audit[name][mask]["value"]) for name in greedy)
    axes.plot(*zip(*line, strict=True) if line else ([], []), color="tab:blue", alpha=0.5)
    for name, one in audit.items():
        value, low, high = (one[mask][key] for key in ("value", "low", "high"))
        if one["seconds"] is None:
            axes.axhline(value, linestyle="--", color="tab:gray")
            label = printable(name).replace("$", r"\$")
            axes.annotate(label, (0, value), textcoords="offset points", xytext=(4, 4), color="tab:gray")
            continue
        color = "tab:blue" if name in greedy else "tab:orange"
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(one["tokens"], value, yerr=errors, fmt="o", color=color, capsize=3)
        place = (5, 5) if name in greedy else (5, -12)
        axes.annotate(name, (one["tokens"], value), textcoords="offset points", xytext=place)
    axes.set_xlabel("tokens a user")
    axes.set_ylabel(f"NDCG@10, {'history masked' if mask == 'masked' else 'history not masked'}")
    axes.grid(alpha=0.3)
    return figure
