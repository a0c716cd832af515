"""Filters, splits and windows: by hand, against the plain twin, and properties that must hold for any input."""

import datetime
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from r2ec_trl.data import Filters, ItemFilter, Source, SplitRule, audit_dataset, prepare, validate_dataset
from r2ec_trl.data.events import parse_date, sort_events
from r2ec_trl.data.stable_hash import mix, text_hashes
from r2ec_trl.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
import twin  # noqa: E402

RULE = SplitRule("leave_one_out")


def source(rows, items=None, ticks=1):
    """A source of (user, item, rating, time) rows; every item has a title unless `items` says otherwise."""
    schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    if items is None:
        items = frame.select("item_id").unique().sort("item_id").with_columns(title=pl.col("item_id"))
    return Source("by hand", frame, items, ticks)


def rows_of(dataset, split):
    part = dataset[split]
    return list(zip(part["user_id"], part["history"], part["target"], part["timestamp"]))


HAND = [
    ("u", "a", 5.0, 10),
    ("u", "b", 4.0, 30),
    ("u", "c", 3.0, 20),
    ("u", "a", 2.0, 40),
    ("v", "b", 5.0, 15),
    ("v", "c", 5.0, 25),
    ("w", "a", 1.0, 5),
]


def test_leave_one_out_by_hand(tmp_path):
    done = prepare(source(HAND), RULE, tmp_path)
    validate_dataset(done.dataset, "here")
    assert done.dataset["train"].to_list() == [
        {
            "user_id": "u",
            "history": ["a"],
            "target": "c",
            "history_ratings": [5.0],
            "history_timestamps": [10],
            "timestamp": 20,
        }
    ]
    assert rows_of(done.dataset, "validation") == [("u", ["a", "c"], "b", 30)]
    assert rows_of(done.dataset, "test") == [("u", ["a", "c", "b"], "a", 40), ("v", ["b"], "c", 25)]
    assert done.dataset["items"]["item_id"][:] == ["a", "b", "c"]
    assert done.dropped == {"too little history to be a target (stays in histories)": 3}
    assert done.facts == {
        "raw_interactions": 7,
        "interactions": 7,
        "users": 3,
        "items": 3,
        "density": 7 / 9,
        "repeated_purchases": 1,
        "tied_with_the_one_before": 0,
        "tied_share": 0.0,
    }


def test_time_cut_window_and_minimum_by_hand(tmp_path):
    at = [datetime.datetime.fromtimestamp(second, datetime.timezone.utc) for second in (25, 40)]
    rule = SplitRule("time_cut", validation_from=at[0], test_from=at[1], max_history=1)
    dataset = prepare(source(HAND), rule, tmp_path).dataset
    assert rows_of(dataset, "train") == [("u", ["a"], "c", 20)]
    assert rows_of(dataset, "validation") == [("u", ["c"], "b", 30), ("v", ["b"], "c", 25)]
    assert rows_of(dataset, "test") == [("u", ["b"], "a", 40)]
    (tmp_path / "2").mkdir()
    rule = SplitRule("leave_one_out", min_history=3)
    with pytest.raises(
        UserError, match=r"leaves no row for .train. \(too little history to be a target .*: [0-9]+\): filter"
    ):
        prepare(source(HAND), rule, tmp_path / "2")


def test_time_ratio_by_hand(tmp_path):
    """Targets in order of time: u/c 20, v/c 25, u/b 30, u/a 40; half, a quarter, a quarter."""
    dataset = prepare(source(HAND), SplitRule("time_ratio", ratio=(0.5, 0.25, 0.25)), tmp_path).dataset
    assert [len(dataset[split]) for split in ("train", "validation", "test")] == [2, 1, 1]
    assert rows_of(dataset, "train") == [("u", ["a"], "c", 20), ("v", ["b"], "c", 25)]
    assert rows_of(dataset, "test") == [("u", ["a", "c", "b"], "a", 40)]


def test_given_histories_see_no_later_split(tmp_path):
    """The test item comes before the train target in time: it must not enter the train history."""
    rows = [("u", "a", 1, 0), ("u", "b", 2, 2), ("u", "c", 3, 0), ("u", "d", 4, 1), ("u", "e", 5, 2)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "split"], orient="row")
    items = pl.DataFrame({"item_id": list("abcde"), "title": list("ABCDE")})
    dataset = prepare(Source("given", frame, items), SplitRule("given"), tmp_path).dataset
    assert rows_of(dataset, "train") == [("u", ["a"], "c", 3)]
    assert rows_of(dataset, "validation") == [("u", ["a", "c"], "d", 4)]
    assert rows_of(dataset, "test") == [("u", ["a"], "b", 2), ("u", ["a", "b", "c", "d"], "e", 5)]
    assert audit_dataset(dataset)["leakage"]["train_after_held_out"] == 1


def test_train_targets_last(tmp_path):
    rows = [("u", item, 1.0, at) for at, item in enumerate("abcdef")]
    done = prepare(source(rows), SplitRule("leave_one_out", train_targets="last"), tmp_path)
    assert rows_of(done.dataset, "train") == [("u", ["a", "b", "c"], "d", 3)]
    assert done.dropped["train target that is not the user's last (stays in histories)"] == 2


def test_filters_are_counted(tmp_path):
    rows = [("u", item, 5.0, at) for at, item in enumerate("abcd")]
    rows += [("u", "a", 4.0, 0), ("u", "b", 5.0, 9), ("u", "d", 1.0, 10), ("u", "x", 5.0, 11), ("u", "y", 5.0, 12)]
    items = pl.DataFrame({"item_id": ["a", "b", "c", "d", "y", "a"], "title": ["A", "B", "C", "D", " ", "again"]})
    done = prepare(source(rows, items), RULE, tmp_path, filters=Filters(repeats="first", min_rating=4.0))
    assert rows_of(done.dataset, "test") == [("u", ["a", "b", "c"], "d", 3)]
    assert done.dataset["items"]["title"][:] == ["A", "B", "C", "D"]
    assert done.dropped == {
        "duplicate of user, item and second": 1,
        "repeat of user and item (kept: first)": 2,
        "interaction with an item without metadata": 1,
        "interaction with an item without a title": 1,
        "item listed again in the metadata": 1,
        "too little history to be a target (stays in histories)": 1,
    }


def test_item_filters_of_the_reference(tmp_path):
    rows = [("u", item, 5.0, at) for at, item in enumerate("abcdef")]
    items = pl.DataFrame(
        {
            "item_id": list("abcdef"),
            "title": ["A", "B", "C", "a long title", "<span id='x'>E</span>", "F"],
            "price": ["1", "$2.50", "1,299.00", "3", "4", "—"],
        }
    )
    rules = ItemFilter(require_price=True, max_title_words=2, drop_markup_titles=True)
    with pytest.raises(UserError, match="leaves no row for 'train'"):
        prepare(source(rows[:3], items.head(2)), RULE, tmp_path, item_filter=rules)
    rows += [("u", "a", 5.0, 10)]
    done = prepare(source(rows, items), RULE, tmp_path, item_filter=rules)
    assert rows_of(done.dataset, "test") == [("u", ["a", "b", "c"], "a", 10)]
    assert done.dropped["interaction with an item without a price"] == 1
    assert done.dropped["interaction with an item with markup in its title"] == 1
    assert done.dropped["interaction with an item whose title has over 2 words"] == 1
    with pytest.raises(UserError, match="needs items with a column 'price'"):
        prepare(source(rows), RULE, tmp_path, item_filter=rules)


def test_items_named_by_their_id(tmp_path):
    none = pl.DataFrame(schema={"item_id": pl.String, "title": pl.String})
    done = prepare(source(HAND, none), RULE, tmp_path, item_filter=ItemFilter(missing_title="id"))
    assert done.dataset["items"].to_list() == [{"item_id": item, "title": item} for item in "abc"]


def test_core_needs_several_rounds(tmp_path):
    """w has one interaction; without it, item c has one; without that, u has one; nothing of v is touched."""
    rows = [("w", "c", 1.0, 1), ("u", "c", 1.0, 2), ("u", "a", 1.0, 3)]
    rows += [(user, item, 1.0, at) for user in ("v", "x") for at, item in enumerate("abab", start=4)]
    done = prepare(source(rows), RULE, tmp_path, filters=Filters(user_core=2, item_core=2))
    assert set(done.dataset["test"]["user_id"]) == {"v", "x"}
    assert done.dropped["2/2-core of users/items"] == 3
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="Nothing is left of 11 interactions after filtering .9/9-core"):
        prepare(source(rows), RULE, tmp_path / "2", filters=Filters(user_core=9, item_core=9))


def seconds(text):
    return int(parse_date(text, "x").timestamp())


def test_window_rolls_back_until_there_are_enough_items(tmp_path):
    days = [
        "2022-01-15",
        "2022-05-15",
        "2022-08-15",
        "2022-10-02",
        "2022-11-01",
        "2022-11-02",
        "2022-11-03",
        "2023-02-01",
    ]
    rows = [(user, f"i{at}", 1.0, seconds(day)) for at, day in enumerate(days) for user in ("u", "v")]
    window = {"window_start": parse_date("2022-10-01", "x"), "window_end": parse_date("2023-01-01", "x")}

    def start(step, items):
        (tmp_path / f"{step}-{items}").mkdir()
        filters = Filters(**window, window_min_items=items, window_step_months=step)
        return prepare(source(rows), RULE, tmp_path / f"{step}-{items}", filters=filters)

    assert start(1, 4).facts["window_start"] == "2022-10-01"
    assert start(1, 5).facts["window_start"] == "2022-08-01"
    assert start(3, 5).facts["window_start"] == "2022-07-01"
    assert start(3, 6).facts["window_start"] == "2022-04-01"
    everything = start(3, 100)
    assert everything.facts["window_start"] == "2022-01-01"
    assert everything.dropped["interaction outside the time window"] == 2


def test_equal_times_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = [(f"u{user}", f"i{item}", float(item % 5), 7) for user in range(30) for item in range(6)]
    events = sort_events(source(rows))
    shuffled = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    again = sort_events(source(shuffled))
    assert (events.item == again.item).all() and (events.rating == again.rating).all()
    orders = {tuple(order) for order in events.item.reshape(30, 6).tolist()}
    assert len(orders) > 15  # no order that a model could learn
    by_item = sort_events(source(shuffled), "item")
    assert {tuple(order) for order in by_item.item.reshape(30, 6).tolist()} == {(0, 1, 2, 3, 4, 5)}
    in_file = sort_events(source([("u", item, 1.0, 7) for item in "cab"]), "file")
    assert in_file.item_ids.gather(in_file.item).to_list() == ["c", "a", "b"]


def test_adding_a_user_does_not_reorder_another(tmp_path):
    rows = [("u", f"i{item}", 1.0, 7) for item in range(8)]
    alone = sort_events(source(rows))
    more = sort_events(source([*rows, ("a", "h", 1.0, 1)]))
    assert alone.item_ids.gather(alone.item).to_list() == more.item_ids.gather(more.item).to_list()[1:]


def test_hash_is_fnv_and_splitmix():
    """FNV-1a of "", "a" and "foobar" from its specification; splitmix64's first outputs for the seed 0."""
    assert [f"{value:x}" for value in text_hashes(pl.Series(["", "a", "foobar"])).tolist()] == [
        "cbf29ce484222325",
        "af63dc4c8601ec8c",
        "85944171f73967e8",
    ]
    gamma = 0x9E3779B97F4A7C15
    seeds = np.array([gamma, 2 * gamma % 2**64], np.uint64)
    assert [f"{value:x}" for value in mix(seeds).tolist()] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4"]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"name": "random"}, "--split 'random' is unknown"),
        ({"name": "leave_one_out", "min_history": 0}, "do not go together"),
        ({"name": "leave_one_out", "min_history": 5, "max_history": 4}, "do not go together"),
        ({"name": "time_ratio", "ratio": (0.8, 0.3, 0.1)}, "must be three positive shares that sum to 1"),
        ({"name": "time_ratio", "ratio": (0.9, 0.1)}, "must be three positive shares"),
        ({"name": "time_cut"}, "needs --validation_from and a later --test_from"),
        ({"name": "given"}, "needs a source that is split already"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(source(HAND), SplitRule(**settings), tmp_path)


def test_dates():
    assert seconds("2022-10-01") == 1664582400
    with pytest.raises(UserError, match="--window_end 'soon' is no date such as 2022-10-01"):
        parse_date("soon", "--window_end")


def drawn_rows(least):
    return st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.integers(0, 60)), min_size=least, max_size=120)


EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@given(
    drawn_rows(25),
    st.sampled_from(["leave_one_out", "time_ratio"]),
    st.integers(1, 3),
    st.integers(3, 6),
    st.integers(0, 3),
)
def test_agrees_with_the_plain_twin(tmp_path_factory, drawn, rule, min_history, max_history, least):
    """Times are made distinct, as the twin knows no tie-break."""
    rows = [(f"u{user}", f"i{item}", 1.0, 1000 * time + at) for at, (user, item, time) in enumerate(drawn)]
    left = twin.core(rows, least)
    expected = twin.split(left, rule, min_history, max_history)
    filters = Filters(user_core=least, item_core=least)
    arguments = source(rows), SplitRule(rule, min_history=min_history, max_history=max_history)
    folder = tmp_path_factory.mktemp("twin")
    if not all(expected.values()):
        with pytest.raises(UserError):
            prepare(*arguments, folder, filters=filters)
        return
    dataset = prepare(*arguments, folder, filters=filters).dataset
    assert {split: rows_of(dataset, split) for split in expected} == expected
    assert dataset["items"]["item_id"][:] == sorted({row[1] for row in left})


@EXAMPLES
@given(drawn_rows(45), st.sampled_from(["leave_one_out", "time_ratio"]), st.randoms())
def test_properties_with_ties(tmp_path_factory, drawn, rule, random):
    """Time order, no leakage, sizes, repeats kept, and no dependence on the order of the file's rows."""
    rows = [(f"u{user}", f"i{item}", 1.0, time // 4) for user, item, time in drawn]
    try:
        done = prepare(source(rows), SplitRule(rule, max_history=4), tmp_path_factory.mktemp("ties"))
    except UserError:
        assume(False)
    dataset = done.dataset
    validate_dataset(dataset, "here")
    audit = audit_dataset(dataset, rule)
    assert not any(audit["leakage"].values()), audit["leakage"]
    distinct = {(user, item, time) for user, item, _, time in rows}
    users = Counter(user for user, _, _ in distinct)
    sizes = [len(dataset[split]) for split in ("train", "validation", "test")]
    assert sum(sizes) == len(distinct) - len(users)
    if rule == "time_ratio":
        total = sum(sizes)
        assert sizes[0] == int(total * 0.8) and sizes[0] + sizes[1] == int(total * (0.8 + 0.1))
    for split in ("train", "validation", "test"):
        for row in dataset[split].to_list():
            times = row["history_timestamps"]
            assert times == sorted(times) and times[-1] <= row["timestamp"] and 1 <= len(times) <= 4
            for item, time in zip([*row["history"], row["target"]], [*times, row["timestamp"]]):
                assert (row["user_id"], item, time) in distinct
    random.shuffle(rows)
    again = prepare(source(rows), SplitRule(rule, max_history=4), tmp_path_factory.mktemp("shuffled")).dataset
    assert {name: part.to_list() for name, part in again.items()} == {
        name: part.to_list() for name, part in dataset.items()
    }


def test_nothing_left_before_the_window_is_one_sentence(tmp_path):
    filters = Filters(min_rating=9, window_start=parse_date("2020-01-01", "--window_start"))
    with pytest.raises(UserError, match=r"Nothing is left of .* \(rating below 9"):
        prepare(source(HAND), SplitRule("leave_one_out"), tmp_path, filters=filters)
