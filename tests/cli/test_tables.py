"""Every figure of a report is in its table, and the captions say which intervals they are."""

import os

import polars as pl
from rich.console import Console

from r2ec_trl.cli.tables import beyond_table, comparison_table, difference_cell, report_table, run_table, slice_table
from r2ec_trl.evaluation.comparison import compare_frames, compare_runs
from r2ec_trl.evaluation.report import report


def frame(rank=(1, 3, 2, 10), masked=None):
    return pl.DataFrame({"user_id": list("uuvw"), "target": list("abac"), "rank": rank, "rank_masked": masked or rank})


def text_of(table):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(table)
    return console.export_text()


def test_tables_show_every_figure():
    result = report(frame(), {"item_to_item": frame(rank=(9, 9, 9, 9))}, {}, ks=[2])
    text = text_of(report_table(result))
    assert "4 rows of 3 users" in text and "item to item" in text and "NDCG@2" in text
    assert "0.5000 [" in text and "0.0000 [0.0000, 0.0000]" in text
    better = frame(rank=(1, 1, 1, 10), masked=(1, 3, 2, 10))
    text = text_of(comparison_table(compare_runs([frame()], {"new [b]": [better]}, ["hit@1"]), "old"))
    assert "+0.500 [" in text and "+0.000 [+0.000, +0.000]" in text and "old" in text and "new [b]" in text
    assert "seeds" not in text and "the 2 tests shown" in text
    text = text_of(comparison_table(compare_runs([frame()], {"new": [better, frame()]}, ["hit@1"])))
    assert "new (2 seeds)" in text and "over users and seeds" in text


def test_a_comparison_tells_the_masks_apart_and_a_small_p_from_0():
    better = frame(rank=(1, 1, 1, 10), masked=(1, 3, 2, 10))
    found = compare_runs([frame()], {"new": [better]}, ["hit@1"])
    found["systems"]["new"]["unmasked"]["hit@1"] |= {"p": 0.00009, "p_holm": 0.0001}
    lines = [
        [word.strip() for word in line.split("│")[1:-1]] for line in text_of(comparison_table(found)).splitlines()
    ]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["Hit@1"][:2] == ["0.2500", "0.7500"] and rows["Hit@1"][3:] == ["<.0001", "0.0001"]
    assert rows["Hit@1 masked"][:2] == ["0.2500", "0.2500"]


def test_the_run_at_one_glance_follows_the_sign_of_the_change():
    before, after = frame(), frame(rank=(99, 99, 99, 99))
    change = compare_frames(before, after)
    result = {"before": report(before, {}, {}), "after": report(after, {}, {}), "difference": change}
    lines = text_of(run_table(result)).splitlines()
    assert [line for line in lines if "before" in line and "1.000" in line]
    assert [line for line in lines if "after - before" in line and "-1.000 [-1.000, -1.000]" in line]
    assert any("95 % bootstrap intervals" in line for line in lines)


def test_slices_and_what_is_recommended():
    described = frame(rank=(1, 3, 2, 11)).with_columns(
        history_items=pl.Series([1, 2, 4, 9]),
        target_popularity=pl.Series(["cold", "tail", "head", "head"]),
        top_item_ids=pl.Series([["a", "b"]] * 4),
    )
    result = report(described, {"popularity": described}, {}, counts={"a": 3, "b": 1, "c": 0, "d": 0})
    result["no_history"] = {"rows": 4, "popularity": result["unmasked"]["popularity"]}
    text = text_of(slice_table(result))
    (line,) = [line for line in text.splitlines() if "targets, unmasked" in line and "cold" in line]
    assert [word.strip() for word in line.split("│")[3:5]] == ["1", "1.0000 [1.0000, 1.0000]"]
    assert "popularity, masked" in text and "middle" not in text and "purchases left out" in text
    (line,) = [line for line in text_of(beyond_table(result)).splitlines() if "model" in line]
    assert [word.strip() for word in line.split("│")[2:6]] == ["50.0%", "0.500", "2.0", "100.0%"]


def test_bold_is_an_interval_without_0():
    """In every direction; one that ends at 0, and that of a single user, is not."""
    bounds = {(0.1, 0.3): True, (-0.3, -0.1): True, (0.0, 0.3): False, (-0.3, 0.0): False, (-0.1, 0.2): False}
    for (low, high), bold in bounds.items():
        figure = {"difference": (low + high) / 2, "low": low, "high": high}
        assert difference_cell(figure).startswith("[bold]") == bold
        assert not difference_cell(figure, several=False).startswith("[bold]")
