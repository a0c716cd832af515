"""Slices and figures beyond accuracy by hand."""

import polars as pl
import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.slices import beyond_accuracy, describe_rows, popularity_of, slices_of, target_counts


def test_equal_counts_lie_in_one_third_and_nothing_trained_is_all_cold():
    assert set(popularity_of({str(item): 2 for item in range(9)}).values()) == {"middle"}
    assert set(popularity_of({"a": 0, "b": 0}).values()) == {"cold"}
    thirds = popularity_of({str(item): item for item in range(1, 100)})  # 4,950 rows: 57 items below a third
    assert [thirds[item] for item in ("1", "57", "58", "81", "82", "99")] == ["tail"] * 2 + ["middle"] * 2 + [
        "head"
    ] * 2


def test_rows_are_described_and_shared_out():
    frame = pl.DataFrame({"user_id": list("uvwxy"), "target": list("aabcc")})
    rows = {"history": [[], ["a"], ["a", "b"], ["a"] * 4, ["a"] * 5]}
    described = describe_rows(frame, rows, {"a": 1, "b": 1, "c": 0})
    assert described["history_items"].to_list() == [0, 1, 2, 4, 5]
    assert described["target_popularity"].to_list() == ["middle"] * 3 + ["cold"] * 2
    found = slices_of(described)
    assert [mask.tolist().index(True) for mask in found["history"].values()] == [0, 1, 2, 3, 4]
    assert found["targets"]["cold"].tolist() == [False] * 3 + [True] * 2
    assert all(sum(sum(mask) for mask in found[name].values()) == 5 for name in ("targets", "history"))
    assert slices_of(frame) == {}


def test_everybody_gets_the_same_and_everybody_something_else():
    """One of four items, always: Gini is (n - 1) / n. All as often: 0."""
    counts = {"a": 9, "b": 1, "c": 0, "d": 0}
    same, other = beyond_accuracy([["a"]] * 4, counts), beyond_accuracy([["a"], ["b"], ["c"], ["d"]], counts)
    assert (same["gini@10"], same["coverage@10"], same["top1_share"]) == (0.75, 0.25, 1.0)
    assert (other["gini@10"], other["coverage@10"], other["top1_share"]) == (pytest.approx(0), 1.0, 0.25)
    assert (same["mean_popularity@10"], other["mean_popularity@10"]) == (9, 2.5)


def test_a_target_outside_the_catalogue():
    with pytest.raises(UserError, match="'z' of a target is not in the catalogue"):
        target_counts({"target": ["z"]}, ["a"])
