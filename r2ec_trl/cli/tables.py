"""Reports as rich tables: rendering alone, no figure is computed here."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from r2ec_trl.cli.terminal import printable
from r2ec_trl.evaluation.report import MASKS
from r2ec_trl.metrics import PERCENT

_METRIC_NAMES = {"hit": "Hit", "ndcg": "NDCG", "mrr": "MRR"}


def report_table(report: Mapping[str, Any]) -> Table:
    """A table of [`~r2ec_trl.evaluation.report.report`]: a line per metric and mask, a column per system."""
    table = Table(title=_title(report), caption=f"{PERCENT} bootstrap interval of users in brackets")
    table.add_column("history")
    table.add_column("metric")
    systems = list(report["unmasked"])
    for system in systems:
        table.add_column(system.replace("_", " "), justify="right")
    for mask in MASKS:
        for number, metric in enumerate(report[mask]["model"]):
            cells = [figure_cell(report[mask][system][metric]) for system in systems]
            table.add_row("" if number else mask, _metric_name(metric), *cells)
        table.add_section()
    return table


def run_table(result: Mapping[str, Any]) -> Table:
    """
    A training run's `metrics.json` (`after`, perhaps `before` and `difference`) at one glance: a line a system, Hit@10
    and NDCG@10, history not masked.
    """
    table = Table(title=_title(result["after"]), caption=f"{PERCENT} bootstrap intervals; all figures: metrics.json")
    table.add_column("test split", no_wrap=True)
    columns = [("unmasked", "hit@10"), ("unmasked", "ndcg@10")]
    for mask, metric in columns:
        table.add_column(f"{_metric_name(metric)}\n{mask}", justify="right", no_wrap=True)
    lines = [(name, result["after"], name) for name in result["after"]["unmasked"] if name != "model"]
    lines += [("before", result["before"], "model")] if "before" in result else []
    for name, report, system in [*lines, ("after", result["after"], "model")]:
        table.add_row(
            name.replace("_", " "), *[figure_cell(report[mask][system][metric], 3) for mask, metric in columns]
        )
    if "difference" in result:
        table.add_section()
        changes = [difference_cell(result["difference"][mask][metric], 3) for mask, metric in columns]
        table.add_row("after - before", *changes)
    return table


def comparison_table(comparison: Mapping[str, Any], reference: str = "before") -> Table:
    """
    A table of [`~r2ec_trl.evaluation.comparison.compare_runs`]; differences whose interval excludes 0 stand out.
    """
    seeds = max(comparison["runs"].values()) > 1
    caption = f"bold: the {PERCENT} interval of the paired difference, over users{' and seeds' * seeds}, excludes 0\n"
    caption += f"p: sign flips over users; Holm: corrected for the {comparison['family']} tests shown"
    table = Table(title=_title(comparison), caption=caption)
    table.add_column("")
    for name in (escape(printable(reference)), "", "difference", "p", "Holm"):
        table.add_column(name, justify="right", no_wrap=name == "difference")
    for system, masks in comparison["systems"].items():
        runs = comparison["runs"][system]
        table.add_row(f"[bold]{escape(printable(system))}[/bold]" + (f" ({runs} seeds)" if seeds else ""))
        for mask, figures in masks.items():
            for metric, figure in figures.items():
                change = difference_cell(figure, 3 if _shows_side(figure, 3) else 4, comparison["users"] > 1)
                cells = (f"{figure['before']:.4f}", f"{figure['after']:.4f}", change)
                label = _metric_name(metric) + " masked" * (mask == "masked")  # 80 columns hold it all
                table.add_row(label, *cells, _p(figure["p"]), _p(figure["p_holm"]))
        table.add_section()
    return table


def _shows_side(figure: Mapping[str, float], digits: int) -> bool:
    """Whether a bound that is not 0 is still none when rounded."""
    return all(round(figure[bound], digits) or not figure[bound] for bound in ("low", "high"))


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<.0001"


def slice_table(report: Mapping[str, Any]) -> Table:
    """NDCG@10 of each slice of a [`~r2ec_trl.evaluation.report.report`], a column a system."""
    table = Table(title="NDCG@10 by slices", caption=f"{PERCENT} bootstrap interval of users in brackets")
    for name in ("rows by", "", "rows"):
        table.add_column(name)
    systems = list(report["unmasked"])
    for system in systems:
        table.add_column(system.replace("_", " "), justify="right")
    for mask in MASKS:
        for name, buckets in report["slices"].items():
            for bucket, figures in buckets.items():
                if mask in figures:
                    cells = [figure_cell(figures[mask][system]["ndcg@10"]) for system in systems]
                    table.add_row(f"{name}, {mask}", bucket, f"{figures['rows']:,}", *cells)
        table.add_section()
    if "no_history" in report:
        found = report["no_history"]
        cells = [figure_cell(found[system]["ndcg@10"]) if system in found else "" for system in systems]
        table.add_row("purchases left out", "all", f"{found['rows']:,}", *cells)
    return table


def beyond_table(report: Mapping[str, Any]) -> Table:
    """Figures beyond accuracy of a [`~r2ec_trl.evaluation.report.report`], a line a system."""
    table = Table(title="What is recommended", caption="history not masked")
    for name in ("", "coverage@10", "Gini@10", "mean popularity@10", "most frequent first item"):
        table.add_column(name, justify="right" if name else "left")
    for system, figures in report["beyond_accuracy"].items():
        coverage, gini, popularity, top1 = figures.values()
        cells = (f"{coverage:.1%}", f"{gini:.3f}", f"{popularity:.1f}", f"{top1:.1%}")
        table.add_row(system.replace("_", " "), *cells)
    return table


def systems_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """Reports of many systems on the same rows, a line each."""
    table = Table(
        title=_title(next(iter(reports.values()))), caption=f"{PERCENT} bootstrap interval of users in brackets"
    )
    table.add_column("", no_wrap=True)
    columns = [(mask, metric) for mask in MASKS for metric in ("hit@10", "ndcg@10")]
    for mask, metric in columns:
        table.add_column(f"{_metric_name(metric)}\n{mask}", justify="right")
    for name in ("NDCG@10\ncold targets", "coverage@10", "Gini@10"):
        table.add_column(name, justify="right")
    for name, report in reports.items():
        cells = [figure_cell(report[mask]["model"][metric], 3) for mask, metric in columns]
        cold, given = report["slices"]["targets"]["cold"], report["beyond_accuracy"]["model"]
        cells.append(figure_cell(cold["unmasked"]["model"]["ndcg@10"], 3) if cold["rows"] else "no row")
        table.add_row(name.replace("_", " "), *cells, f"{given['coverage@10']:.1%}", f"{given['gini@10']:.3f}")
    return table


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['rows']:,} rows of {result['users']:,} users"


def _metric_name(metric: str) -> str:
    name, _, cutoff = metric.partition("@")
    return f"{_METRIC_NAMES.get(name, name)}@{cutoff}"


def figure_cell(figure: Mapping[str, float], digits: int = 4) -> str:
    """`value [low, high]`."""
    return f"{figure['value']:.{digits}f} [dim]\\[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}][/dim]"


def difference_cell(figure: Mapping[str, float], digits: int = 4, several: bool = True) -> str:
    """`difference [low, high]`, bold where the interval of several users excludes 0."""
    low, high = f"{figure['low']:+.{digits}f}", f"{figure['high']:+.{digits}f}"
    text = f"{figure['difference']:+.{digits}f} [dim]\\[{low}, {high}][/dim]"
    return f"[bold]{text}[/bold]" if several and (figure["low"] > 0 or figure["high"] < 0) else text
