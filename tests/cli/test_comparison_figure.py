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
