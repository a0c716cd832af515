"""What counts as a price, and that every item that goes is counted."""

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
