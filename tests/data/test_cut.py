"""The most frequent items and some users stay; everything else is counted."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from r2ec_trl.data.cut import cut_dataset
from r2ec_trl.errors import UserError


def test_a_cut_is_a_smaller_valid_dataset(shop):
    dropped = Counter()
    small = cut_dataset(shop, max_items=30, max_users=4, dropped=dropped)
    counts = Counter(target for split in ("train", "validation", "test") for target in shop[split]["target"])
    assert len(small["items"]) == 30 and dropped["cut: item"] == 10
    least = min(counts[item] for item in small["items"]["item_id"])
    assert all(counts[item] <= least for item in set(shop["items"]["item_id"]) - set(small["items"]["item_id"]))
    for split in ("train", "validation", "test"):
        assert len(set(small[split]["user_id"])) <= 4
        for row in small[split]:
            assert {row["target"], *row["history"]} <= set(small["items"]["item_id"])
    assert cut_dataset(shop, max_users=4, dropped=Counter())["train"].to_list() == [
        row
        for row in shop["train"]
        if row["user_id"] in set(cut_dataset(shop, max_users=4, dropped=Counter())["train"]["user_id"])
    ]


def test_nothing_left_is_one_sentence(shop):
    with pytest.raises(UserError, match="leaves no row in split"):
        cut_dataset(shop, max_users=0, dropped=Counter())


def test_a_cut_by_hand():
    """
    d, then a and b (two targets each, by id), c after them: three items leave c out. A history of two that keeps one
    stays, one of three that keeps one goes.
    """
    rows = [("u", "ac", "d"), ("u", "acc", "d"), ("v", "ab", "d"), ("v", "b", "a"), ("w", "d", "a"), ("w", "d", "b")]
    rows += [("x", "a", "b"), ("x", "a", "c"), ("y", "b", "c")]
    split = Dataset.from_list([{"user_id": u, "history": list(h), "target": t} for u, h, t in rows])
    one = Dataset.from_list([{"user_id": "z", "history": ["a"], "target": "d"}])
    items = Dataset.from_list([{"item_id": item, "title": item} for item in "cbda"])
    dropped = Counter()
    small = cut_dataset(DatasetDict(train=split, validation=one, test=one, items=items), max_items=3, dropped=dropped)
    assert sorted(small["items"]["item_id"][:]) == ["a", "b", "d"]
    assert small["train"]["history"][:] == [["a"], *map(list, ["ab", "b", "d", "d", "a"])]
    assert sorted(dropped.values()) == [1, 1, 1, 2]
