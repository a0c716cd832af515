"""What counts as a price, and that every item that goes is counted."""

import dataclasses
from collections import Counter

import polars as pl

from r2ec_trl.data.events import sort_events
from r2ec_trl.data.item_filter import ItemFilter, filter_items
from r2ec_trl.data.sources.source import Source


def test_each_filter_drops_its_own():
    interactions = pl.DataFrame({"user_id": list("uuu"), "item_id": list("abc"), "timestamp": [1, 2, 3]})
    columns = {
        "item_id": list("abc"),
        "title": ["one", "two words", "three words here"],
        "price": ["$1,299.00", "—", ".99"],
    }
    items = pl.DataFrame(columns)
    events = sort_events(Source("hand", interactions, items))
    for rules, left in (
        (ItemFilter(), "abc"),
        (ItemFilter(require_price=True), "ac"),
        (ItemFilter(max_title_words=2), "ab"),
        (ItemFilter(require_price=True, max_title_words=2), "a"),
    ):
        dropped = Counter()
        kept, catalogue = filter_items(events, items, items, rules, dropped)
        assert kept.item_ids.gather(kept.item).to_list() == list(left) and sum(dropped.values()) == 3 - len(left)
        assert set(left) <= set(catalogue["item_id"])


def test_items_named_by_their_id_pass_what_looks_at_titles():
    """Unknown to the metadata, or without a title there; without a known price they go where one is required."""
    interactions = pl.DataFrame({"user_id": list("uuu"), "item_id": list("abc"), "timestamp": [1, 2, 3]})
    items = pl.DataFrame({"item_id": list("ab"), "title": ["one", None], "price": ["1", "2"]})
    events = sort_events(Source("hand", interactions, items))
    for rules, left in ((ItemFilter(max_title_words=2, drop_markup_titles=True), "abc"), (ItemFilter(True), "ab")):
        dropped = Counter()
        rules = dataclasses.replace(rules, missing_title="id")
        kept, catalogue = filter_items(events, items, items, rules, dropped)
        assert kept.item_ids.gather(kept.item).to_list() == list(left)
        assert dict(catalogue.select("item_id", "title").rows()) == {"a": "one", "b": "b", "c": "c"}


def test_of_an_item_listed_twice_the_one_with_a_title_stays():
    interactions = pl.DataFrame({"user_id": list("uu"), "item_id": list("ab"), "timestamp": [1, 2]})
    items = pl.DataFrame({"item_id": list("aabb"), "title": [None, "one", "two", "three"]})
    dropped = Counter()
    kept, catalogue = filter_items(
        sort_events(Source("hand", interactions, items)), items, items, ItemFilter(), dropped
    )
    assert catalogue.rows() == [("a", "one"), ("b", "two")] and len(kept) == 2
    assert dropped["item listed again in the metadata"] == 2
