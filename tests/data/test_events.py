"""Histories are in order of time, ties do not depend on the file, and a core is a core."""

from collections import Counter

import polars as pl

from r2ec_trl.data.events import drop_repeats, k_core, sort_events
from r2ec_trl.data.sources.source import Source


def sort(rows, **settings):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return sort_events(Source("hand", frame, frame.select("item_id").unique()), **settings)


def items(events):
    return events.item_ids.gather(events.item).to_list()


def test_by_user_then_time():
    events = sort([("v", "a", 1), ("u", "b", 5), ("u", "c", 2)])
    assert events.user.tolist() == [0, 0, 1] and items(events) == ["c", "b", "a"]


def test_ties_do_not_depend_on_the_file_unless_they_should():
    rows = [("u", item, 7) for item in "dbca"]
    assert items(sort(rows)) == items(sort(rows[::-1])) != items(sort(rows, tie_break="item")) == list("abcd")
    assert items(sort(rows, tie_break="file")) == list("dbca")


def test_repeats():
    events = sort([("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "b", 2)])
    assert [items(drop_repeats(events, keep, Counter())) for keep in ("keep", "first", "last")] == [
        ["a", "b", "a"],  # the second b of one moment is a duplicate
        ["a", "b"],
        ["b", "a"],
    ]


def test_a_two_core_by_hand():
    """x is bought once, so it goes; then w has one purchase left and goes too."""
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 2), ("w", "x", 1), ("w", "a", 2)]
    dropped = Counter()
    core = k_core(sort(rows), 2, 2, dropped)
    assert items(core) == ["a", "b", "a", "b"] and sum(dropped.values()) == 2
