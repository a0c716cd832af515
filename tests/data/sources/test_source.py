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


def test_flags_become_parameters():
    assert Kind(print, "input=folder skip_bad_rows").parameters == {
        "input": "folder",
        "skip_bad_rows": "skip_bad_rows",
    }
