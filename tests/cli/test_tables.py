"""Every figure of a report is in its table, and the captions say which intervals they are."""

import os

import polars as pl
from rich.console import Console

from r2ec_trl.cli.tables import cold_table, comparison_table, report_table, run_table
from r2ec_trl.evaluation.report import cold_report, compare_frames, report


def frame(rank=(1, 3, 2, 10), masked=None):
    return pl.DataFrame({"user_id": list("uuvw"), "target": list("abac"), "rank": rank, "rank_masked": masked or rank})


def text_of(table):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(table)
    return console.export_text()


def test_tables_show_every_figure():
    result = report(frame(), {"item_to_item": ([9, 9, 9, 9], [9, 9, 9, 9])}, {}, ks=[2])
    text = text_of(report_table(result))
    assert "4 rows of 3 users" in text and "item to item" in text and "NDCG@2" in text
    assert "0.5000 [" in text and "0.0000 [0.0000, 0.0000]" in text
    text = text_of(comparison_table(compare_frames(frame(), frame(rank=(1, 1, 1, 10), masked=(1, 3, 2, 10)), ks=[1])))
    assert "+0.5000 [" in text and "+0.0000 [+0.0000, +0.0000]" in text


def test_the_run_at_one_glance_follows_the_sign_of_the_change():
    before, after = frame(), frame(rank=(99, 99, 99, 99))
    change = compare_frames(before, after)
    result = {"before": report(before, {}, {}), "after": report(after, {}, {}), "difference": change}
    lines = text_of(run_table(result)).splitlines()
    assert [line for line in lines if "before" in line and "1.000" in line]
    assert [line for line in lines if "after - before" in line and "-1.000 [-1.000, -1.000]" in line]
    assert any("95 % bootstrap intervals" in line for line in lines)


def test_cold_targets_stand_apart():
    text = text_of(cold_table(cold_report(frame(), [True, False, False, False], ks=[2])))
    assert "cold targets (1)" in text and "the others (3)" in text
    (line,) = [line for line in text.splitlines() if "unmasked" in line]
    assert "1.0000" in line.split("│")[3] and "0.3333" in line.split("│")[4]  # hit@2 of rank 1; of 3, 2 and 10
