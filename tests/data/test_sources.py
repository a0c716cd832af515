"""Tiny files of every format, written by hand, and the exact rows that come out."""

import gzip
import json
from collections import Counter

import polars as pl
import pytest

from r2ec_trl.data import import_amazon, import_movielens, import_recbole, import_table
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


def test_movielens_100k(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    flags = {"242": "0|1|0", "302": "0|0|0"}
    titles = {"242": "Misérables, Les (1995)", "302": "unknown"}
    (tmp_path / "u.item").write_bytes(
        "".join(f"{key}|{titles[key]}|01-Jan-1995||http://x|{flags[key]}\n" for key in flags).encode("latin-1")
    )
    (tmp_path / "u.genre").write_text("unknown|0\nDrama|1\nWar|2\n\n")
    source = import_movielens(tmp_path)
    assert source.interactions.to_dicts() == [
        {"user_id": "196", "item_id": "242", "rating": 3.0, "timestamp": 881250949},
        {"user_id": "186", "item_id": "302", "rating": 3.0, "timestamp": 891717742},
    ]
    assert source.items.to_dicts() == [
        {"item_id": "242", "title": "Misérables, Les (1995)", "genres": ["Drama"], "year": "1995"},
        {"item_id": "302", "title": "unknown", "genres": [], "year": None},
    ]


def test_movielens_1m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        "661::Élan: A Film (1996)::Drama|Musical\n1193::Cuckoo (1975)::Drama\n".encode("latin-1")
    )
    source = import_movielens(tmp_path)
    assert source.interactions.rows() == [("1", "1193", 5.0, 978300760), ("1", "661", 3.0, 978302109)]
    assert source.items.to_dicts() == [
        {"item_id": "661", "title": "Élan: A Film (1996)", "genres": ["Drama", "Musical"], "year": "1996"},
        {"item_id": "1193", "title": "Cuckoo (1975)", "genres": ["Drama"], "year": "1975"},
    ]


def test_movielens_csv(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n296,"President, The (1995)",Comedy|Drama\n306,"Say ""Hi""",(no genres listed)\n'
    )
    source = import_movielens(tmp_path)
    assert source.interactions.rows() == [("1", "296", 5.0, 1147880044), ("1", "306", 3.5, 1147868817)]
    assert source.items.to_dicts() == [
        {"item_id": "296", "title": "President, The (1995)", "genres": ["Comedy", "Drama"], "year": "1995"},
        {"item_id": "306", "title": 'Say "Hi"', "genres": None, "year": None},
    ]


def test_movielens_that_is_none(tmp_path):
    with pytest.raises(UserError, match="has no u.data, ratings.dat or ratings.csv"):
        import_movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(UserError, match="has ratings.csv but no movies.csv"):
        import_movielens(tmp_path)


def recbole(folder, inter, item=None, name="shop"):
    (folder / f"{name}.inter").write_text(inter)
    if item is not None:
        (folder / f"{name}.item").write_text(item)
    return folder


def test_recbole(tmp_path):
    recbole(
        tmp_path,
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4.5\t881250949.0\nu\tj\t1\t9e8\n",
        'item_id:token\tmovie_title:token_seq\tclass:token_seq\ni\tThe "One\tDrama War\nj\tTwo\t\n',
    )
    source = import_recbole(tmp_path)
    assert source.interactions.rows() == [("u", "i", 4.5, 881250949), ("u", "j", 1.0, 900000000)]
    assert source.items.to_dicts() == [
        {"item_id": "i", "title": 'The "One', "class": "Drama War"},
        {"item_id": "j", "title": "Two", "class": None},
    ]


def test_recbole_with_given_splits_and_no_ratings(tmp_path):
    for word, row in {"train": "u\ti\t1", "valid": "u\tj\t2", "test": "u\ti\t3"}.items():
        (tmp_path / f"shop.{word}.inter").write_text(f"user_id:token\titem_id:token\ttimestamp:float\n{row}\n")
    source = import_recbole(tmp_path)
    assert source.interactions.rows() == [("u", "i", 1, 0), ("u", "j", 2, 1), ("u", "i", 3, 2)]
    assert source.items.is_empty()


def test_recbole_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="holds no .inter file"):
        import_recbole(tmp_path)
    recbole(tmp_path, "user_id:token\titem_id:token\nu\ti\n")
    with pytest.raises(UserError, match=r"has no column 'timestamp' \(for timestamp\); it has user_id:token"):
        import_recbole(tmp_path)
    recbole(tmp_path, "", name="other")
    with pytest.raises(UserError, match="holds files of other, shop"):
        import_recbole(tmp_path)


TABLE = {"customer": ["a/../b", "ü"], "product": ["1", "2"], "bought": [1000, 2500], "stars": [1.5, 5.0]}
COLUMNS = {"user_column": "customer", "item_column": "product", "time_column": "bought", "rating_column": "stars"}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
def test_tables(tmp_path, name):
    frame, path = pl.DataFrame(TABLE), tmp_path / name
    if "csv" in name:
        put(path, frame.write_csv().encode())
    elif "tsv" in name:
        put(path, frame.write_csv(separator="\t").encode())
    elif "jsonl" in name:
        put(path, frame.write_ndjson().encode())
    else:
        frame.write_parquet(path)
    (tmp_path / "items.csv").write_text("product,name,colour\n1,One,red\n2,,blue\n")
    source = import_table(path, tmp_path / "items.csv", **COLUMNS, title_column="name", timestamp_unit="ms")
    assert source.interactions.rows() == [("a/../b", "1", 1.5, 1000), ("ü", "2", 5.0, 2500)]
    assert source.ticks_per_second == 1000
    assert source.items.to_dicts() == [
        {"item_id": "1", "title": "One", "colour": "red"},
        {"item_id": "2", "title": None, "colour": "blue"},
    ]


def test_table_with_dates_and_splits(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 1], "item_id": [7, 8], "split": ["Train", "dev"]})
    times = pl.Series("timestamp", ["2020-01-01T00:00:01", "2020-01-02T00:00:00"]).str.to_datetime()
    frame.with_columns(times).write_parquet(tmp_path / "t.parquet")
    source = import_table(tmp_path / "t.parquet", split_column="split")
    assert source.interactions.rows() == [("1", "7", 1577836801, 0), ("1", "8", 1577923200, 1)]
    frame.with_columns(times, split=pl.lit("nowhere")).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 1 is in none of the splits train, validation, test"):
        import_table(tmp_path / "t.parquet", split_column="split")


HEADER = "user_id,item_id,rating,timestamp\n"


@pytest.mark.parametrize(
    "row, sentence",
    [
        ("u,i,5,-1", r"row 2 has a negative timestamp \('-1'\)"),
        ("u,i,5,", "row 2 has a timestamp that is no whole number"),
        ("u,i,5,1.5", r"row 2 has a timestamp that is no whole number \('1.5'\)"),
        ("u,i,5,soon", "row 2 has a timestamp that is no whole number"),
        ("u,i,5,1588687728923", "row 2 has a timestamp after the year 5000 .is --timestamp_unit right"),
        ("u,i,five,1", r"row 2 has a rating that is no number \('five'\)"),
        ("u,i,nan,1", "row 2 has a rating that is no number"),
        ("u,i,,1", "row 2 has a rating that is no number"),
        (",i,5,1", "row 2 has no user_id"),
        ("u,,5,1", "row 2 has no item_id"),
        ("u,i,5,1,more", "row 2: 5 fields where the file has 4 columns"),
        ("u,i", "row 2 has a rating that is no number"),
        ('u,"i,5,1', "row 2"),
        ("u,\xff,5,1", "row 2: not utf-8 text"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path, row, sentence):
    path = tmp_path / "t.csv"
    path.write_bytes((HEADER + "u,i,5,1\n").encode() + row.encode("latin-1") + b"\nu,j,5,2\n")
    with pytest.raises(UserError, match=sentence) as caught:
        import_table(path)
    assert "t.csv" in str(caught.value) and "--skip_bad_rows" in str(caught.value) and "\n" not in str(caught.value)
    source = import_table(path, skip_bad_rows=True)
    assert source.interactions["timestamp"].to_list() in ([1, 2], [1])  # an open quote takes the next row with it
    assert sum(source.dropped.values()) == 1


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "the file is empty|no header"),
        (HEADER.encode(), "the file is empty"),
        (
            b"user,item_id,rating,timestamp\nu,i,5,1\n",
            r"has no column 'user_id' \(for user_id\); it has user, item_id",
        ),
        (b"user_id,user_id\nu,i\n", "names column 'user_id' twice"),
        (HEADER.encode() + b"u,i,5,-1\n", "no interaction is left after the bad rows|negative"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, sentence):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(UserError, match=sentence) as caught:
            import_table(path, skip_bad_rows=skip)
        assert "\n" not in str(caught.value)


def test_blank_lines_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfuser_id,item_id,timestamp\r\n\r\n"u, 1","i ""x""",1\r\n\r\n"u\r\n2",j,2\r\n\r\n')
    assert import_table(path).interactions.rows() == [("u, 1", 'i "x"', 1), ("u\r\n2", "j", 2)]


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match="t.parquet cannot be read as parquet") as caught:
        import_table(tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)


def test_bad_rows_are_found_beyond_the_first_block(tmp_path, monkeypatch):
    import r2ec_trl.data.sources.delimited as delimited

    monkeypatch.setattr(delimited, "BLOCK_BYTES", 50)
    path = tmp_path / "t.csv"
    rows = [f"u{row},i,5,{row}" for row in range(40)]
    path.write_text(HEADER + "\n".join(rows))
    assert import_table(path).interactions["timestamp"].to_list() == list(range(40))
    rows[30] = "u30,i,5,30,31"
    path.write_text(HEADER + "\n".join(rows))
    with pytest.raises(UserError, match="row 31: 5 fields"):
        import_table(path)
    rows[30], rows[35] = 'u30,"i\n,i",5,30', "u,i,x,1"
    path.write_text(HEADER + "\n".join(rows))
    with pytest.raises(UserError, match="row 36 has a rating"):
        import_table(path)
    source = import_table(path, skip_bad_rows=True)
    assert source.interactions.height == 39 and source.interactions["item_id"][30] == "i\n,i"
    assert source.dropped == Counter({"row that has a rating that is no number": 1})
