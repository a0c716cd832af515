"""Amazon's files, written by hand, and the exact rows that come out."""

import gzip
import json

import polars as pl
import pytest

from r2ec_trl.data import import_amazon
from r2ec_trl.data.item_filter import price
from r2ec_trl.errors import UserError

AMAZON = [
    {"user_id": "AE1", "asin": "B0x", "parent_asin": "B01", "rating": 5.0, "timestamp": 1588687728923},
    {"user_id": "AE1", "asin": "B02", "parent_asin": "B02", "rating": 4.0, "timestamp": 1588687730001},
    {"user_id": "AE2", "asin": "B01", "parent_asin": "B01", "rating": 1.0, "timestamp": 1600000000000},
]


AMAZON_ROWS = [
    {"user_id": "AE1", "item_id": "B01", "rating": 5.0, "timestamp": 1588687728923},
    {"user_id": "AE1", "item_id": "B02", "rating": 4.0, "timestamp": 1588687730001},
    {"user_id": "AE2", "item_id": "B01", "rating": 1.0, "timestamp": 1600000000000},
]


META = [
    {
        "main_category": "Toys",
        "title": "Robot",
        "average_rating": 4.5,
        "rating_number": 12,
        "features": ["Walks", "Talks"],
        "description": [],
        "price": 12.99,
        "images": [{"thumb": "x"}],
        "videos": [],
        "store": "Acme",
        "categories": ["Toys", "Robots"],
        "details": {"Color": "Red"},
        "parent_asin": "B01",
        "bought_together": None,
    },
    {"parent_asin": "B02", "title": "Ball", "price": "—", "description": ["Round.", "Red."], "rating_number": None},
    {"parent_asin": "B99", "title": "Nobody bought it", "price": None},
]


META_ROWS = [
    {
        "item_id": "B01",
        "title": "Robot",
        "subtitle": None,
        "main_category": "Toys",
        "description": [],
        "features": ["Walks", "Talks"],
        "categories": ["Toys", "Robots"],
        "store": "Acme",
        "price": "12.99",
        "average_rating": "4.5",
        "rating_number": "12",
    },
    {
        "item_id": "B02",
        "title": "Ball",
        "subtitle": None,
        "main_category": None,
        "description": ["Round.", "Red."],
        "features": None,
        "categories": None,
        "store": None,
        "price": "—",
        "average_rating": None,
        "rating_number": None,
    },
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def ratings_csv(rows, header="user_id,parent_asin,rating,timestamp"):
    table = [f"{row['user_id']},{row['parent_asin']},{row['rating']},{row['timestamp']}" for row in rows]
    return "\n".join([header, *table, ""]).encode()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    "reviews, name, content",
    [
        ("raw", "raw/review_categories/Toys.jsonl", lines(AMAZON)),
        ("raw", "raw/review_categories/Toys.jsonl.gz", lines(AMAZON)),
        ("raw", "Toys.jsonl.gz", lines(AMAZON)),
        ("5core", "benchmark/5core/rating_only/Toys.csv", ratings_csv(AMAZON)),
        ("0core", "benchmark/0core/rating_only/Toys.csv.gz", ratings_csv(AMAZON)),
        ("5core", "Toys.csv.gz", ratings_csv(AMAZON)),
        ("5core", "Toys.csv", ratings_csv(AMAZON).replace(b"\n", b"\r\n")),
        ("5core", "Toys.parquet", None),
    ],
)
def test_amazon(tmp_path, reviews, name, content):
    if content is None:
        pl.DataFrame(AMAZON).write_parquet(tmp_path / name)
    else:
        put(tmp_path / name, content)
    nested = "raw/meta_categories/" if "/" in name else ""
    put(tmp_path / f"{nested}meta_Toys.jsonl.gz", lines(META))
    source = import_amazon("Toys", tmp_path, reviews=reviews)
    assert source.interactions.to_dicts() == AMAZON_ROWS
    assert source.items.to_dicts() == META_ROWS
    assert source.ticks_per_second == 1000
    assert source.dropped == {"metadata of an item nobody bought": 1}


def test_amazon_metadata_as_parquet(tmp_path):
    put(tmp_path / "Toys.csv", ratings_csv(AMAZON))
    copied = [{**row, "price": str(row["price"])} for row in META]  # as copies made through pandas hold it
    pl.DataFrame(copied, schema_overrides={"price": pl.String}).drop("images", "videos", "details").write_parquet(
        tmp_path / "meta_Toys.parquet"
    )
    items = import_amazon("Toys", tmp_path).items
    assert items["price"].to_list() == ["12.99", "—"]
    assert items["description"].to_list() == [[], ["Round.", "Red."]]
    assert items["item_id"].to_list() == ["B01", "B02"]


def test_amazon_benchmark_splits(tmp_path):
    header = "user_id,parent_asin,rating,timestamp,history"
    for word, row, history in zip(("train", "valid", "test"), AMAZON, ("", "B01", "")):
        text = f"{header}\n{row['user_id']},{row['parent_asin']},{row['rating']},{row['timestamp']},{history}\n"
        put(tmp_path / f"benchmark/5core/last_out/Toys.{word}.csv", text.encode())
    put(tmp_path / "meta_Toys.jsonl", lines(META))
    rows = import_amazon("Toys", tmp_path, reviews="5core_last_out").interactions
    assert rows["split"].to_list() == [0, 1, 2]
    assert rows.drop("split").to_dicts() == AMAZON_ROWS


def test_amazon_metadata_with_surprises(tmp_path):
    """A description that is text instead of a list, an absent title, a row without an id: each on its own."""
    put(tmp_path / "Toys.csv", ratings_csv(AMAZON))
    odd = [{"parent_asin": "B01", "description": "Just text."}, {"parent_asin": "B02", "features": [], "title": None}]
    put(tmp_path / "meta_Toys.jsonl", lines(odd))
    items = import_amazon("Toys", tmp_path).items
    assert items["description"].to_list() == [["Just text."], None]
    assert items["title"].to_list() == [None, None]
    put(tmp_path / "meta_Toys.jsonl", lines([*odd, {"title": "no id"}]))
    with pytest.raises(UserError, match="meta_Toys.jsonl, row 3 has no parent_asin"):
        import_amazon("Toys", tmp_path)
    source = import_amazon("Toys", tmp_path, skip_bad_rows=True)
    assert source.dropped["row that has no parent_asin"] == 1


def test_amazon_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    put(tmp_path / "benchmark/5core/rating_only/Toys.csv", ratings_csv(AMAZON))
    put(tmp_path / "raw/meta_categories/meta_Toys.jsonl", lines(META))
    asked = []

    def fetch(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert import_amazon("Toys").interactions.to_dicts() == AMAZON_ROWS
    hub = "McAuley-Lab/Amazon-Reviews-2023"
    assert asked == [
        (hub, "benchmark/5core/rating_only/Toys.csv", "dataset"),
        (hub, "raw/meta_categories/meta_Toys.jsonl", "dataset"),
    ]


def test_amazon_from_the_hub_without_a_network(monkeypatch, tmp_path):
    """conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(
        UserError, match="The hub cannot be reached for benchmark/5core/rating_only/Toys.csv"
    ) as caught:
        import_amazon("Toys")
    assert "\n" not in str(caught.value)


def test_amazon_by_url(tmp_path, monkeypatch):
    import r2ec_trl.data.sources.amazon as amazon

    files = {"benchmark/0core/rating_only/Toys.csv": ratings_csv(AMAZON)}
    files["raw/meta_categories/meta_Toys.jsonl"] = lines(META)
    asked = []

    def fetch(url, path, progress=None):
        asked.append(url)
        put(path, files[url.removeprefix("https://x.example/root/").removesuffix(".gz")])
        return path

    monkeypatch.setattr(amazon, "download", fetch)
    source = import_amazon("Toys", "https://x.example/root/", reviews="0core", download_dir=tmp_path)
    assert source.interactions.to_dicts() == AMAZON_ROWS
    assert asked == [f"https://x.example/root/{name}.gz" for name in files]


def test_amazon_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="has no Toys.csv"):
        import_amazon("Toys", tmp_path)
    with pytest.raises(UserError, match="--reviews 'all' is unknown"):
        import_amazon("Toys", tmp_path, reviews="all")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("12.99", 12.99),
        ("$12.99", 12.99),
        ("US$1,299.00", 1299.0),
        (" 7 ", 7.0),
        (".99", 0.99),
        ("1,299", 1299.0),
        ("—", None),
        ("from 14.99", None),
        ("12.99 - 15.99", None),
        ("1,29", None),
        ("", None),
        (None, None),
        ("nan", None),
    ],
)
def test_prices(text, expected):
    assert (
        pl.DataFrame({"price": [text]}, schema={"price": pl.String}).select(price(pl.col("price"))).item() == expected
    )
