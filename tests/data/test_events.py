"""Histories are in order of time, ties do not depend on the file, and a core is a core."""

import datetime
import time
from collections import Counter

import polars as pl

from r2ec_trl.data.events import drop_repeats, k_core, parse_date, sort_events, time_window
from r2ec_trl.data.sources.source import Source


def sort(rows, ticks_per_second=1, **settings):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return sort_events(Source("hand", frame, frame.select("item_id").unique(), ticks_per_second), **settings)


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


def test_duplicates_are_of_one_second_whatever_the_unit():
    """Milliseconds 2,001 and 2,999 are one second, 3,000 is the next."""
    events = sort([("u", "a", 2_001), ("u", "a", 2_999), ("u", "a", 3_000)], ticks_per_second=1_000)
    assert drop_repeats(events, "keep", Counter()).time.tolist() == [2_001, 3_000]


def test_a_window_holds_its_start_and_not_its_end():
    events = sort([("u", "a", 9_999), ("u", "b", 10_000), ("u", "c", 19_999), ("u", "d", 20_000)], 1_000)
    start, end = (datetime.datetime.fromtimestamp(second, datetime.timezone.utc) for second in (10, 20))
    dropped = Counter()
    window, _ = time_window(events, start, end, min_items=0, step_months=1, cores=(0, 0), dropped=dropped)
    assert items(window) == ["b", "c"] and sum(dropped.values()) == 2


def test_a_date_is_midnight_in_utc_wherever_it_is_read(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert parse_date("2022-10-01", "--window_start").timestamp() == 1_664_582_400
    finally:
        monkeypatch.undo()
        time.tzset()
