"""Counting baselines by hand, and against a plain twin that fills the whole (N, N) matrix."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.baselines import ScoredBaseline, baseline_frame, item_to_item, popularity, positions

ITEMS = ["a", "b", "c", "d"]


def rows(*pairs):
    return {"history": [list(history) for history, _ in pairs], "target": [target for _, target in pairs]}


def ranks(baseline, dataset):
    """Rank of each row's target, and its rank with the history masked."""
    pairs = [answer[:2] for answer in baseline.answers(positions(dataset, baseline.index))]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T


def twin(train, test, item_ids, transitions, max_history_items=20):
    """Ranks the plain way: a full matrix of counts, a sort key per item."""
    index = {item: row for row, item in enumerate(item_ids)}
    counts, popular = np.zeros((len(index), len(index))), np.zeros(len(index))
    for history, target in zip(train["history"], train["target"], strict=True):
        popular[index[target]] += 1
        for distance, item in enumerate(history[::-1][:max_history_items], 1):
            counts[index[item], index[target]] += transitions / distance
    ranks = []
    for history, target in zip(test["history"], test["target"], strict=True):
        votes = sum((counts[index[i]] / d for d, i in enumerate(history[::-1][:max_history_items], 1)), np.zeros(1))
        keys = [(round(v, 9), p) for v, p in zip(votes + 0 * popular, popular, strict=True)]
        rivals = [keys[index[item]] >= keys[index[target]] for item in item_ids if item not in (target, *history)]
        alone = [keys[index[item]] >= keys[index[target]] for item in item_ids if item != target]
        ranks.append((1 + sum(alone), len(item_ids) + 1 if target in history else 1 + sum(rivals)))
    return np.array(ranks).T


def test_popularity_by_hand():
    """Targets c, c, b: c 2, b 1, a and d 0. Ties count against the target, so a and d both have rank 4."""
    baseline = popularity(rows(("a", "c"), ("a", "c"), ("a", "b")), ITEMS)
    rank, masked = ranks(baseline, rows(("a", "c"), ("a", "b"), ("b", "a"), ("c", "d"), ("ab", "d")))
    assert rank.tolist() == [1, 2, 4, 4, 4]
    assert masked.tolist() == [1, 2, 3, 3, 2]


def test_item_to_item_by_hand():
    """Train (a b) -> c and (b) -> d: counts a-c 1/2, b-c 1, b-d 1; c and d are equally popular.

    After (b) c and d tie at 1: rank 2 each. After (b a) c scores 1/2 + 1/2 = 1 and d 1/2. After (a b) c scores
    1/4 + 1 and d 1. After (d) nothing votes and popularity decides: c and d (1 each) before a and b.
    """
    baseline = item_to_item(rows(("ab", "c"), ("b", "d")), ITEMS)
    rank, masked = ranks(
        baseline, rows(("b", "c"), ("b", "d"), ("ba", "c"), ("ba", "d"), ("ab", "d"), ("d", "c"), ("d", "a"))
    )
    assert rank.tolist() == [2, 2, 1, 2, 2, 2, 4]
    assert masked.tolist() == [2, 2, 1, 2, 2, 1, 3]


def test_a_repeat_target_is_a_miss_only_with_the_mask():
    """Mistake 16: the mask is a switch. a follows a in train, so the repeat has rank 1, and N + 1 = 5 masked."""
    for baseline in (item_to_item(rows(("a", "a")), ITEMS), popularity(rows(("a", "a")), ITEMS)):
        rank, masked = ranks(baseline, rows(("a", "a"), ("aa", "a")))
        assert rank.tolist() == [1, 1] and masked.tolist() == [5, 5]


def test_equal_sums_tie_whatever_their_terms():
    """After (a b e), c scores 1/2 + (1/4)/3 and d (1/2)/2 + 1/3: both 7/12, one bit apart as floats. Both rank 2."""
    train = rows(("b", "c"), ("afff", "c"), ("bf", "d"), ("a", "d"))
    baseline = item_to_item(train, list("abcdef"))
    assert ranks(baseline, rows(("abe", "c"), ("abe", "d")))[0].tolist() == [2, 2]


def test_only_the_newest_history_items_count():
    train = rows(("abbb", "c"), ("b", "d"))
    baseline = item_to_item(train, ITEMS, max_history_items=3)
    assert ranks(baseline, rows(("a", "c")))[0].tolist() == [2]  # a was the fourth: popularity alone, c and d tie
    test = rows(("abbb", "c"), ("bbba", "d"))
    assert np.array_equal(ranks(baseline, test), twin(train, test, ITEMS, 1, 3))


ROW = st.tuples(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=6).map("".join), st.sampled_from(ITEMS))


@settings(deadline=None)
@given(
    train=st.lists(ROW, min_size=1, max_size=12), test=st.lists(ROW, min_size=1, max_size=6), limit=st.integers(1, 7)
)
def test_agrees_with_the_twin(train, test, limit):
    train, test = rows(*train), rows(*test)
    assert np.array_equal(ranks(popularity(train, ITEMS), test), twin(train, test, ITEMS, 0))
    assert np.array_equal(ranks(item_to_item(train, ITEMS, limit), test), twin(train, test, ITEMS, 1, limit))


def test_best_items_are_those_of_the_ranks():
    """
    After (b) c and d have a vote each and are equally popular: catalogue order. After (a) c has half a vote, then d,
    the other bought item, then a and b. Popularity: c and d before a and b.
    """
    train, test = rows(("ab", "c"), ("b", "d")), {**rows(("b", "c"), ("a", "d")), "user_id": ["u", "v"]}
    best = baseline_frame(item_to_item(train, ITEMS), test)["top_item_ids"].to_list()
    assert best == [["c", "d", "a", "b"], ["c", "d", "a", "b"]]
    frame = baseline_frame(popularity(rows(("a", "d"), ("a", "d"), ("a", "b")), ITEMS), test)
    assert frame["top_item_ids"].to_list() == [["d", "b", "a", "c"]] * 2
    assert frame.columns == ["user_id", "target", "rank", "rank_masked", "top_item_ids"]
    many = [f"i{item}" for item in range(30)]
    train = {"history": [["i3"]] * 3, "target": ["i9", "i9", "i7"]}
    frame = baseline_frame(item_to_item(train, many), {"user_id": ["u"], "history": [["i3"]], "target": ["i7"]})
    assert frame["top_item_ids"][0].to_list() == ["i9", "i7", "i0", "i1", "i2", "i3", "i4", "i5", "i6", "i8"]


def test_scores_become_ranks_with_ties_against_the_target():
    """Scores 3 1 1 0 for everybody: b and c tie at rank 3; with b masked c is second; a repeat is N + 1."""
    index = {item: row for row, item in enumerate(ITEMS)}
    seen = []

    def score(histories):
        seen.append(len(histories))
        return np.tile([3.0, 1.0, 1.0, 0.0], (len(histories), 1))

    test = {**rows(("d", "b"), ("b", "c"), ("b", "b"), ("", "d"), ("a", "d")), "user_id": list("uvwxy")}
    frame = baseline_frame(ScoredBaseline(index, score, batch_size=2), test)
    assert frame["rank"].to_list() == [3, 3, 3, 4, 4] and frame["rank_masked"].to_list() == [3, 2, 5, 4, 3]
    assert frame["top_item_ids"].to_list() == [["a", "b", "c", "d"]] * 5 and seen == [2, 2, 1]
    for wrong in (np.full((1, 4), np.nan), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="Scores must be finite, one an item and history"):
            baseline_frame(ScoredBaseline(index, lambda _, wrong=wrong: wrong), {**rows(("a", "b")), "user_id": ["u"]})


def test_takes_a_dataset_and_an_empty_split():
    train = Dataset.from_dict(rows(("ab", "c")))
    rank, masked = ranks(item_to_item(train, ITEMS), train)
    assert rank.tolist() == [1] and masked.tolist() == [1] and rank.dtype == np.int64
    assert [len(side) for side in ranks(popularity(train, ITEMS), rows())] == [0, 0]
    assert ranks(item_to_item(rows(), ITEMS), train)[0].tolist() == [4]


def test_no_square_matrix_for_a_large_catalogue():
    """200,000 items squared would be 320 GB; the pairs of one row are two."""
    item_ids = [str(item) for item in range(200_000)]
    baseline = item_to_item({"history": [["1", "2"]], "target": ["3"]}, item_ids)
    assert baseline.transitions.weights.tolist() == [0.5, 1.0]
    assert ranks(baseline, {"history": [["2"]], "target": ["3"]})[0].tolist() == [1]


def test_mistakes():
    with pytest.raises(UserError, match="'z' of a history or target is not in the catalogue"):
        item_to_item(rows(("az", "c")), ITEMS)
    with pytest.raises(UserError, match="not in the catalogue"):
        ranks(popularity(rows(("a", "c")), ITEMS), rows(("a", "z")))
    with pytest.raises(UserError, match="max_history_items is 0"):
        item_to_item(rows(("a", "c")), ITEMS, max_history_items=0)
