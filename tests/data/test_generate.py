"""Invented categories are read as real ones are."""

import pytest

from r2ec_trl.data import import_amazon
from r2ec_trl.data.generate import CATEGORY, generate_amazon


@pytest.mark.parametrize(("kind", "reviews"), [("parquet", "5core"), ("csv.gz", "5core"), ("jsonl.gz", "raw")])
def test_every_kind_is_read_back(tmp_path, kind, reviews):
    source = import_amazon(CATEGORY, generate_amazon(tmp_path, 60, 10, 12, kind=kind, seed=1), reviews=reviews)
    counts = source.interactions["user_id"].value_counts()["count"]
    assert len(source.interactions) == 60 and len(counts) == 10 and counts.min() >= 5
    assert set(source.interactions["item_id"]) <= set(source.items["item_id"])
    again = import_amazon(CATEGORY, generate_amazon(tmp_path / "b", 60, 10, 12, kind=kind, seed=1), reviews=reviews)
    assert source.interactions.equals(again.interactions)
