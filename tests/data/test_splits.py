"""Targets by hand: two users with three and one purchases."""

from collections import Counter

import numpy as np
import polars as pl
import pytest

from r2ec_trl.data.events import sort_events
from r2ec_trl.data.sources.source import Source
from r2ec_trl.data.splits import SplitRule, first_of_user, seen_before, split_targets
from r2ec_trl.errors import UserError


def events():
    rows = {"user_id": ["v", "u", "u", "u", "u"], "item_id": list("adcba"), "timestamp": [9, 4, 3, 2, 1]}
    return sort_events(Source("hand", pl.DataFrame(rows), pl.DataFrame({"item_id": list("abcd")})))


def test_positions_in_a_history():
    user = np.array([0, 0, 0, 2, 2])
    assert seen_before(user).tolist() == [0, 1, 2, 0, 1] and first_of_user(user).tolist() == [0, 0, 0, 3, 3]


def test_the_last_tests_and_the_one_before_validates():
    dropped = Counter()
    targets = split_targets(events(), SplitRule("leave_one_out"), dropped)
    assert {split: chosen.positions.tolist() for split, chosen in targets.items()} == {
        "train": [1],
        "validation": [2],
        "test": [3],
    }
    assert dropped["too little history to be a target (stays in histories)"] == 2  # the first of u, and v's only one


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (SplitRule("half"), "--split 'half' is unknown"),
        (SplitRule("time_ratio", ratio=(0.8, 0.3, 0.1)), "sum to 1"),
        (SplitRule("time_cut"), "needs --validation_from"),
        (SplitRule("leave_one_out", min_history=3, max_history=2), "do not go together"),
    ],
)
def test_rules_that_cannot_be_meant(rule, sentence):
    with pytest.raises(UserError, match=sentence):
        split_targets(events(), rule, Counter())
