"""Item text: chosen fields in a stable order, HTML and blanks cleaned, long fields cut by words."""

from __future__ import annotations

import html
import logging
from collections.abc import Sequence

import polars as pl

from ..errors import UserError

logger = logging.getLogger(__name__)

FUTURE_FIELDS = ("average_rating", "rating_number")
_TAG = r"(?s)<!--.*?-->|<script\b[^<>]*>.*?</script\s*>|<style\b[^<>]*>.*?</style\s*>|</?[a-zA-Z][^<>]*>"
_ENTITY = r"&#?[0-9a-zA-Z]+;?"
_INVISIBLE = r"[\u{00ad}\u{200b}\u{feff}]"
_BLANKS = r"[\s\p{Cc}]+"


def item_text(items: pl.DataFrame, fields: Sequence[str] | None, max_words: int | None) -> pl.DataFrame:
    """
    The catalogue as the dataset folder holds it: `item_id`, `title`, then the chosen fields, cleaned.

    Args:
        items (`polars.DataFrame`):
            `item_id`, `title` and further columns; lists of text are joined, numbers written out.
        fields (`Sequence[str]`, *optional*):
            Fields besides the title, in the order the prompts show them. All, in the order of the source, by
            default, except those that leak the future.
        max_words (`int`, *optional*):
            Words kept of each field; no limit by default.
    """
    known = [name for name in items.columns if name not in ("item_id", "title")]
    if fields is None:
        chosen = [name for name in known if name not in FUTURE_FIELDS]
    else:
        chosen = [name for name in dict.fromkeys(fields) if name != "title"]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UserError(f"--item_fields names '{unknown[0]}', which the items lack: they have {', '.join(known)}.")
    for name in chosen:
        if name in FUTURE_FIELDS:
            logger.warning("Item field %s was crawled after the split and leaks the future into item text.", name)
    kinds = items.schema
    columns = [clean_text(_as_string(name, kinds[name]), max_words).alias(name) for name in ("title", *chosen)]
    return items.select("item_id", *columns)


def clean_text(text: pl.Expr, max_words: int | None = None) -> pl.Expr:
    """Text without tags, entities and runs of blanks; an empty one becomes null. Cleaning twice changes nothing."""
    cleaned = _collapse(text)
    markup = cleaned.str.contains(_ENTITY) | cleaned.str.contains("<", literal=True)
    slow = pl.when(markup).then(cleaned).map_batches(_without_markup, return_dtype=pl.String)
    cleaned = pl.when(markup).then(slow).otherwise(cleaned)
    if max_words is not None:
        cleaned = cleaned.str.split(" ").list.head(max_words).list.join(" ")
    return pl.when(cleaned != "").then(cleaned)


def _collapse(text: pl.Expr) -> pl.Expr:
    return text.str.replace_all(_INVISIBLE, "").str.replace_all(_BLANKS, " ").str.strip_chars(" ")


def _without_markup(text: pl.Series) -> pl.Series:
    """Tags out and entities resolved until nothing changes: shops escape twice."""
    while True:
        plain = text.str.replace_all(_TAG, " ")
        plain = pl.Series(text.name, [None if one is None else html.unescape(one) for one in plain], dtype=pl.String)
        plain = plain.to_frame("text").select(_collapse(pl.col("text")))["text"]
        if plain.equals(text, null_equal=True):
            return plain
        text = plain


def _as_string(name: str, kind: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if isinstance(kind, pl.List):
        return column.list.eval(pl.element().cast(pl.String)).list.drop_nulls().list.join(" ")
    return column.cast(pl.String)
