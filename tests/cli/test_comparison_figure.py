"""Every system has its line and every mask and metric its panel."""

import polars as pl
import pytest

from r2ec_trl.cli.comparison_figure import comparison_figure
from r2ec_trl.evaluation.comparison import compare_runs


def frame(rank=(1, 3, 2, 10)):
    return pl.DataFrame({"user_id": list("uuvw"), "target": list("abac"), "rank": rank, "rank_masked": rank})


def test_a_line_a_system_and_a_panel_a_figure():
    better = frame(rank=(1, 1, 1, 1))
    found = compare_runs([frame()], {"better": [better], "$x$": [frame()]}, ["hit@1", "mrr@5"])
    panels = comparison_figure(found, "start").axes
    titles = ["hit@1, unmasked", "mrr@5, unmasked", "hit@1, masked", "mrr@5, masked"]
    assert [axes.get_title() for axes in panels] == titles
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["better", "\\$x\\$"]
    (dot, *_), *_ = panels[0].containers[0], None
    assert dot.get_xdata().tolist() == pytest.approx([found["systems"]["better"]["unmasked"]["hit@1"]["difference"]])
    assert "start" in comparison_figure(found, "start").get_supxlabel()
    colors = [line.lines[0].get_color() for line in panels[0].containers]
    assert colors == ["C0", "C7"]  # an interval without 0, and one with it


def test_one_user_decides_nothing():
    """One user with three rows: an interval without width, whose ends may lie beside the difference by a rounding."""
    one = frame(rank=(1, 1, 50, 9)).with_columns(user_id=pl.lit("u"))
    found = compare_runs([one], {"better": [one.with_columns(rank=pl.lit(1))]}, ["hit@10"])
    figure = found["systems"]["better"]["unmasked"]["hit@10"]
    assert figure["difference"] == pytest.approx(0.25) == figure["low"]
    for ends in ({}, {"low": figure["difference"] + 1e-16, "high": figure["difference"] - 1e-16}):
        figure |= ends
        panels = comparison_figure(found, "start").axes
        assert [axes.containers[0].lines[0].get_color() for axes in panels] == ["C7", "C7"]
