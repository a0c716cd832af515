"""Item text: chosen fields in a stable order, HTML and blanks cleaned, long fields cut by words."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence

import polars as pl

from r2ec_trl.data.sources.jsonl import listing
from r2ec_trl.errors import UserError

logger = logging.getLogger(__name__)

FUTURE_FIELDS = ("average_rating", "rating_number")
_HIDDEN = re.compile(r"<!--|<(script|style)\b[^<>]*>")  # what begins text that no reader of a page sees
_TAG = r"</?[a-zA-Z][^<>]*>"
_ESCAPED = r"&(?:(?:amp|#0*38|#[xX]0*26);)+"  # escaped time and again
_PASSES = 10  # of cleaning: text that still changes is written to stall, not to be read
_ENTITY = r"&#?[0-9a-zA-Z]+;?"
_NO_CHARACTER = "&#[0-9]{20,};?"  # a number without end, which Python refuses to read
_INVISIBLE = r"[\u{00ad}\u{200b}\u{feff}]"
_BLANK = r"[[\s\p{Cc}]--[ ]]"


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
            Words kept of each field besides the title; no limit by default.
    """
    known = [name for name in items.columns if name not in ("item_id", "title")]
    if fields is None:
        chosen = [name for name in known if name not in FUTURE_FIELDS]
        if left := [name for name in known if name in FUTURE_FIELDS]:
            logger.warning("Item field %s leaks the future and is left out; --item_fields keeps it.", listing(left))
    else:
        chosen = [name for name in dict.fromkeys(fields) if name != "title"]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            have = listing(known) or "titles alone"
            raise UserError(f"--item_fields names '{unknown[0]}', which the items lack: they have {have}.")
    for name in chosen:
        if name in FUTURE_FIELDS:
            logger.warning("Item field %s was crawled after the split and leaks the future into item text.", name)
    limits = {name: None if name == "title" else max_words for name in ("title", *chosen)}
    columns = [clean_text(_as_string(items[name]), limit) for name, limit in limits.items()]
    return items.select("item_id").with_columns(*columns)


def clean_text(text: pl.Series, max_words: int | None = None) -> pl.Series:
    """Text without tags, entities and runs of blanks; an empty one becomes null. Cleaning twice changes nothing."""
    cleaned = _without_markup(_collapse(text))
    if max_words is not None:
        long = (cleaned.str.count_matches(" ", literal=True) >= max_words).arg_true()
        short = cleaned.gather(long).str.split(" ").list.head(max_words).list.join(" ")
        cleaned = cleaned.scatter(long, short)
    return cleaned.set(cleaned == "", None)


def _collapse(text: pl.Series) -> pl.Series:
    text = text.str.replace_all(_INVISIBLE, "").str.replace_all(_BLANK, " ")
    return text.str.replace_all(" {2,}", " ").str.strip_chars(" ")


def _without_markup(text: pl.Series) -> pl.Series:
    """Tags out and entities resolved until nothing changes, as shops escape twice; in bounded time."""
    places = (text.str.contains(_ENTITY) | text.str.contains("<", literal=True)).arg_true()
    for _ in range(_PASSES):
        if not len(places):
            return text
        old = text.gather(places)
        seen = pl.Series(text.name, [_without_hidden(one) for one in old.to_list()], pl.String)
        plain = seen.str.replace_all(_TAG, " ").str.replace_all(_ESCAPED, "&").str.replace_all(_NO_CHARACTER, "\ufffd")
        new = _collapse(pl.Series(text.name, [html.unescape(one) for one in plain], pl.String))
        changed = new != old
        places, text = places.filter(changed), text.scatter(places, new)
    return text.scatter(places, _collapse(text.gather(places).str.replace_all("[&<]", " ")))


def _without_hidden(text: str) -> str:
    """Without comments, scripts and styles, in one walk: what does not end is left."""
    kept, at, endless = [], 0, set()
    for opening in _HIDDEN.finditer(text):
        end = "-->" if opening[1] is None else f"</{opening[1]}"
        if opening.start() < at or end in endless:
            continue
        close = text.find(end, opening.end())
        close = close if end == "-->" or close < 0 else text.find(">", close)
        if close < 0:
            endless.add(end)
            continue
        kept += [text[at : opening.start()], " "]
        at = close + (3 if end == "-->" else 1)
    return "".join([*kept, text[at:]]) if at else text


def _as_string(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.List):
        return column.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    return column.cast(pl.String)
