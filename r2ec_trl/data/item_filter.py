"""Which items stay: those with a title, and on request only those with a price or a short title."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl

from r2ec_trl.data.events import Events, drop_items
from r2ec_trl.errors import UserError

# An optional currency sign, then 12, 12.99, 1,299.00 or .99 - nothing else: "from 14.99" and "—" are no price.
_PRICE = r"^(?:[A-Z]{0,3}[$€£¥])?\s*([0-9]+(?:\.[0-9]+)?|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|\.[0-9]+)$"


@dataclass(frozen=True)
class ItemFilter:
    """
    Filters on items; each is off by default and counts what it drops.

    Args:
        require_price (`bool`, *optional*, defaults to `False`):
            Drop items whose `price` is no number.
        max_title_words (`int`, *optional*):
            Drop items with a longer title.
        drop_markup_titles (`bool`, *optional*, defaults to `False`):
            Drop items whose raw title holds `<span id`, instead of cleaning it.
        missing_title (`str`, *optional*, defaults to `"drop"`):
            `"id"` names items without metadata or title by their id.
    """

    require_price: bool = False
    max_title_words: int | None = None
    drop_markup_titles: bool = False
    missing_title: str = "drop"


def filter_items(
    events: Events, items: pl.DataFrame, raw: pl.DataFrame, rules: ItemFilter, dropped: Counter[str]
) -> tuple[Events, pl.DataFrame]:
    """
    Drop items, and the interactions with them, which are counted cause by cause. `items` is the catalogue with cleaned
    text, `raw` the same rows as the source has them.
    """
    checks = items.select(
        "item_id",
        title="title",
        words=pl.col("title").str.count_matches(" ", literal=True) + 1,
        markup=raw["title"].cast(pl.String).str.contains("<span id", literal=True),
        priced=_is_price(raw, rules),
    )
    titled_first = (
        checks.select("item_id", "title").with_row_index().sort(pl.col("title").is_null(), maintain_order=True)
    )
    kept = titled_first.unique("item_id", keep="first")["index"]
    first = pl.int_range(checks.height, eager=True).is_in(kept.implode())
    dropped["item listed again in the metadata"] += int((~first).sum())
    items, checks = items.filter(first), checks.filter(first)
    if rules.missing_title == "id":
        absent = events.item_ids.filter(~events.item_ids.is_in(items["item_id"].implode()))
        items = pl.concat([items, pl.DataFrame({"item_id": absent})], how="diagonal")
        items = items.with_columns(pl.coalesce("title", "item_id").alias("title"))
        unseen = pl.DataFrame({"item_id": absent})  # an item that is named by its id has one word and no markup
        checks = pl.concat([checks, unseen], how="diagonal").with_columns(
            pl.col("words").fill_null(1), pl.col("markup").fill_null(False), pl.col("priced").fill_null(False)
        )
    else:
        events = drop_items(events, checks["item_id"], "an item without metadata", dropped)
        checks = checks.filter(pl.col("title").is_not_null())
        events = drop_items(events, checks["item_id"], "an item without a title", dropped)
    for wanted, test, cause in (
        (rules.require_price, "priced", "an item without a price"),
        (rules.drop_markup_titles, ~pl.col("markup"), "an item with markup in its title"),
        (
            rules.max_title_words is not None,
            pl.col("words") <= (rules.max_title_words or 0),
            f"an item whose title has over {rules.max_title_words} words",
        ),
    ):
        if wanted:
            checks = checks.filter(test)
            events = drop_items(events, checks["item_id"], cause, dropped)
    return events, items


def price(text: pl.Expr) -> pl.Expr:
    """A price as a number, null where there is none: `12.99`, `$12.99`, `1,299.00`, not `—` or `from 14.99`."""
    return text.cast(pl.String).str.strip_chars().str.extract(_PRICE, 1).str.replace_all(",", "").cast(pl.Float64)


def _is_price(raw: pl.DataFrame, rules: ItemFilter) -> pl.Series:
    if not rules.require_price:
        return pl.repeat(True, raw.height, eager=True)
    if "price" not in raw.columns:
        raise UserError("--require_price needs items with a column 'price', and this source has none: leave it out.")
    return raw.select(price(pl.col("price")).is_not_null()).to_series()
