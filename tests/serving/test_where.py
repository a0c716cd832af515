"""A condition on columns: what it matches, and what it may not be."""

import polars as pl
import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.serving.where import matching_rows

ITEMS = pl.DataFrame(
    {"title": ["red bow", "blue case", "it's"], "price": ["$1,299.00", "80", None], "year": [1, 2, 3]}
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("year >= 2", [False, True, True]),
        ("price < 100", [False, True, False]),
        ("title LIKE '%b%' AND NOT year = 2", [True, False, False]),
        ("title = 'it''s' OR year IN (1)", [True, False, True]),
        ("price IS NULL", [False, False, True]),
    ],
)
def test_by_hand(where, rows):
    assert matching_rows(ITEMS, where) == rows


@pytest.mark.parametrize("where", ["colour = 'red'", "year", "year ="])
def test_what_is_no_condition(where):
    with pytest.raises(UserError):
        matching_rows(ITEMS, where)
