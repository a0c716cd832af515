"""Rows to add and to change, by hand."""

import pytest
from datasets import Dataset

from r2ec_trl.bundle.catalogue import new_rows, with_changes
from r2ec_trl.errors import UserError

ITEMS = Dataset.from_list(
    [{"item_id": "a", "title": "bow", "price": 2}, {"item_id": "b", "title": "case", "price": 3}]
)


def test_new_rows_have_the_catalogues_columns():
    assert new_rows(ITEMS, [{"title": "strap", "item_id": "c"}]).to_list() == [
        {"item_id": "c", "title": "strap", "price": None}
    ]


def test_changes_keep_order_and_the_other_columns():
    items, touched = with_changes(ITEMS, [{"item_id": "b", "price": 9.0}])
    assert touched == [1] and items.to_list() == [ITEMS[0], {"item_id": "b", "title": "case", "price": 9}]


@pytest.mark.parametrize(
    ("change", "rows", "sentence"),
    [
        (new_rows, [{"item_id": "a", "title": "x"}], "in the catalogue already"),
        (new_rows, [{"item_id": "c"}], "has no title"),
        (with_changes, [{"item_id": "z", "price": 1}], "not in the catalogue"),
        (with_changes, [{"item_id": "a", "title": None}], "would lose its title"),
        (new_rows, [{"item_id": "c", "title": " "}], "has no title"),
        (with_changes, [{"item_id": "a", "title": ""}], "would lose its title"),
        (with_changes, [{"item_id": "a", "price": 1.5}], "Column 'price' holds int64: .* whole numbers"),
        (with_changes, [{"item_id": "a", "price": 2**70}], "Column 'price' holds int64"),
    ],
)
def test_mistakes(change, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        change(ITEMS, rows)
