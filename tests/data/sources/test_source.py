"""What an importer hands over is checked row by row."""

from collections import Counter

import polars as pl
import pytest

from r2ec_trl.data.sources.jsonl import ROW
from r2ec_trl.data.sources.source import Kind, check_interactions
from r2ec_trl.errors import UserError


def frame(**columns):
    return pl.DataFrame(
        {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": ["1", "2"], **columns}
    ).with_columns(pl.Series(ROW, [1, 2], dtype=pl.Int64))


def test_types_come_out_right():
    rows = check_interactions([frame(rating=["4.5", "1"])], "t.csv", skipped=None)
    assert rows.select("user_id", "item_id", "rating", "timestamp").rows() == [("u", "a", 4.5, 1), ("v", "b", 1.0, 2)]


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_a_gap_is_named_or_counted(column):
    wrong = frame(**{column: ["", {"user_id": "v", "item_id": "b", "timestamp": "2"}[column]]})
    with pytest.raises(UserError, match="t.csv.*1"):
        check_interactions([wrong], "t.csv", skipped=None)
    skipped = Counter()
    assert check_interactions([wrong], "t.csv", skipped=skipped).height == 1 and sum(skipped.values()) == 1


def test_a_unit_that_is_none():
    with pytest.raises(UserError, match="--timestamp_unit 'h' is unknown"):
        check_interactions([frame()], "t.csv", skipped=None, unit="h")


@pytest.mark.parametrize(
    "time, unit, flag, said",
    [
        (1_600_000_000, "ms", "--timestamp_unit", "no time is after 1973 (is --timestamp_unit right? s would fit)"),
        (1_600_000_000, "ms", "", "no time is after 1973 (this source counts in ms; s would fit)"),
        (1_600_000_000_000, "ns", "", "(this source counts in ns; ms would fit)"),
        (1_600_000_000, "s", "", ""),
        (90_000_000, "ms", "", ""),  # a day of times that begin at 0
    ],
)
def test_times_in_a_coarser_unit_are_told(caplog, time, unit, flag, said):
    check_interactions([frame(timestamp=[time, time - 1])], "t.csv", skipped=None, unit=unit, flag=flag)
    assert said in caplog.text and bool(caplog.text) is bool(said)


def test_a_source_without_the_flag_does_not_name_it():
    sentence = r"t.csv, row 1 has a timestamp after the year 5000 \(this source counts in s; ms would fit\) \('16"
    with pytest.raises(UserError, match=sentence):
        check_interactions([frame(timestamp=["1600000000000", "1600000000001"])], "t.csv", skipped=None)


def test_one_time_for_all_is_told(caplog):
    check_interactions([frame(timestamp=["5", "5"])], "t.csv", skipped=None)
    assert "every row has the same time" in caplog.text


def test_flags_become_parameters():
    assert Kind(print, "input=folder skip_bad_rows").parameters == {
        "input": "folder",
        "skip_bad_rows": "skip_bad_rows",
    }
