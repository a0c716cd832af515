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


@pytest.mark.parametrize("unit, ticks", [("s", 1), ("ms", 1_000), ("ns", 1_000_000_000)])
def test_dates_as_text_are_times_in_utc(unit, ticks):
    """Among them numbers; what is neither is a bad row."""
    times = {
        "2018-09-20": 1537401600,
        "2018-07-07 22:09:11": 1531001351,
        "2020-01-01T00:00:01Z": 1577836801,
        "2020-01-01T01:00:00.000+01:00": 1577836800,
        " 2020-01-01 00:00 ": 1577836800,
        "2020-01-01 00:00:02 UTC": 1577836802,
        str(1577836800 * ticks): 1577836800,
    }
    rows = pl.DataFrame({"user_id": ["u"] * len(times), "item_id": ["a"] * len(times), "timestamp": list(times)})
    rows = rows.with_row_index(ROW, 1)
    found = check_interactions([rows], "t.csv", skipped=None, unit=unit)
    assert found["timestamp"].to_list() == [second * ticks for second in times.values()]
    for wrong in ("2018-13-01", "20/09/2018", "soon", "1.5"):
        with pytest.raises(UserError, match=f"row 2 has a timestamp that is no whole number and no date .*{wrong}"):
            check_interactions([frame(timestamp=["2018-09-20", wrong])], "t.csv", skipped=None, unit=unit)


@pytest.mark.parametrize("highest, told", [("5", False), ("10", True)])
def test_ratings_on_another_scale_are_told(caplog, highest, told):
    check_interactions([frame(rating=["1", highest])], "t.csv", skipped=None)
    assert ("train with --use_ratings false" in caplog.text) is told


def test_one_id_is_written_in_one_way_whatever_stands_beside_it():
    floats = [frame(user_id=[3.0, 4.0]), frame(user_id=[3.0, 4.5]), frame(user_id=[3.0, 1e30])]
    found = check_interactions(floats, "t.parquet", skipped=None)["user_id"].to_list()
    assert found == ["3", "4", "3", "4.5", "3", "1e+30"]


def test_an_id_without_end_is_refused_before_it_is_hashed():
    with pytest.raises(UserError, match="t.csv, row 2 has a item_id of over 10,000 bytes; mend the row"):
        check_interactions([frame(item_id=["i" * 10_000, "j" * 10_001])], "t.csv", skipped=None)


def test_days_written_as_numbers_are_told(caplog):
    check_interactions([frame(timestamp=["20200131", "20200201"])], "t.csv", skipped=None)
    assert "times such as 20200201 are taken as s since 1970; write days as 2020-01-31" in caplog.text


@pytest.mark.parametrize("unit, told", [("s", True), ("ms", False)])
@pytest.mark.parametrize("kind", [pl.String, pl.Datetime("us")])
def test_times_finer_than_the_unit_are_told(caplog, unit, told, kind):
    times = pl.Series(["2020-01-01 00:00:00.250", "2020-01-01 00:00:00.750"]).str.to_datetime("%Y-%m-%d %H:%M:%S%.f")
    path = f"{unit}.{kind}"
    found = check_interactions([frame(timestamp=times.cast(kind))], path, skipped=None, unit=unit)["timestamp"]
    assert ("finer than 1/1 s" in caplog.text) is told and found.n_unique() == (1 if told else 2)
