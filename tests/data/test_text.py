"""Item text: order, cleaning, word limit, and fields that leak the future."""

import logging

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2ec_trl.data.text import clean_text, item_text
from r2ec_trl.errors import UserError


def cleaned(text, max_words=None):
    return clean_text(pl.Series("text", [text], dtype=pl.String), max_words).item()


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("plain", "plain"),
        ("  two \t\n words\u00a0here ", "two words here"),
        ("<p>One</p><br/>Two", "One Two"),
        ("<!-- no --><script>if (a < b) {}</script>yes<style>p {}</style>", "yes"),
        ("Tom &amp; Jerry&#39;s &quot;x&quot;", 'Tom & Jerry\'s "x"'),
        ("&lt;b&gt;twice&lt;/b&gt; &amp;amp; more", "twice & more"),
        ("3 < 5 and 7 > 6", "3 < 5 and 7 > 6"),
        ("AT&T", "AT&T"),
        (f"&#{'1' * 5_000}; a &#x{'1' * 5_000};", "\ufffd a \ufffd"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("", None),
        ("<br>", None),
        (None, None),
    ],
)
def test_cleaning(raw, expected):
    assert cleaned(raw) == expected


@given(st.text(alphabet=st.sampled_from("ab <>/&;#3l tgm\n\u00a0!-\"'")))
def test_cleaning_twice_changes_nothing(text):
    once = cleaned(text)
    assert cleaned(once) == once


def test_word_limit():
    assert cleaned("one <b>two</b> three four", 3) == "one two three"


def catalogue():
    return pl.DataFrame(
        {
            "average_rating": [4.5],
            "item_id": ["a"],
            "description": [["<p>Big", None, "dog</p>"]],
            "title": ["A &amp; B"],
            "price": [2.5],
        }
    )


def test_fields_and_their_order():
    frame = item_text(catalogue(), None, None)  # the order of the source behind id and title, no crawled figure
    assert frame.columns == ["item_id", "title", "description", "price"]
    assert frame.rows() == [("a", "A & B", "Big dog", "2.5")]
    assert item_text(catalogue(), ["price", "description", "price", "title"], 1).columns == [
        "item_id",
        "title",
        "price",
        "description",
    ]
    with pytest.raises(UserError, match="names 'colour', which the items lack"):
        item_text(catalogue(), ["colour"], None)
    with pytest.raises(UserError, match="they have titles alone"):
        item_text(catalogue().select("item_id", "title"), ["colour"], None)


def test_leaking_fields_warn(caplog):
    with caplog.at_level(logging.WARNING):
        frame = item_text(catalogue(), ["average_rating"], None)
    assert frame["average_rating"].to_list() == ["4.5"]
    assert "leaks the future" in caplog.text
