"""Any table: columns by name, dates, given splits, bad rows."""

import gzip
import json

import polars as pl
import pytest

from r2ec_trl.data import import_table
from r2ec_trl.data.sources.table import import_items
from r2ec_trl.errors import UserError


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


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
        ("u,i,5,1.5", r"row 2 has a timestamp that is no whole number and no date \('1.5'\)"),
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


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_blank_and_empty_names_of_columns(tmp_path, caplog, ending):
    """A header is read alike in every format: blanks around a name are none of it, a nameless index is left out."""
    frame = pl.DataFrame({" item_id": ["1"], "title ": ["One"], " brand ": ["b"], "": ["0"]})
    path = tmp_path / f"items.{ending}"
    frame.write_csv(path) if ending == "csv" else frame.write_parquet(path)
    assert import_items(path, "item_id", "title").to_dicts() == [{"item_id": "1", "title": "One", "brand": "b"}]
    assert "unnamed column 3 is an index without a name" in caplog.text


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_another_separator_is_named(tmp_path, separator):
    (tmp_path / "t.csv").write_text("user_id,item_id,timestamp\nu,i,1\n".replace(",", separator))
    with pytest.raises(
        UserError, match="t.csv has no column 'user_id' .* its fields stand between .*save it with"
    ) as it:
        import_table(tmp_path / "t.csv")
    assert repr(separator) in str(it.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_of_rows_is_told(tmp_path, indent):
    (tmp_path / "t.json").write_text(json.dumps([{"user_id": "u"}], indent=indent))
    with pytest.raises(UserError, match="t.json, row 1: .*write each (of its objects )?on a line of its own"):
        import_table(tmp_path / "t.json")


@pytest.mark.parametrize("word", ["N/A", "\\N", "nan", "NULL"])
def test_words_for_nothing_are_no_title(tmp_path, word):
    (tmp_path / "i.csv").write_text(f"item_id,title\n1,{word}\n2,Two\n")
    assert import_items(tmp_path / "i.csv", "item_id", "title")["title"].to_list() == [None, "Two"]


LOG = '{"reviewerID": "u", "asin": "a", "unixReviewTime": 5}\n{"reviewerID": "v", "asin": "b", "unixReviewTime": 7}\n'


def test_keys_that_a_json_file_has_are_named(tmp_path):
    (tmp_path / "t.jsonl").write_text(LOG)
    with pytest.raises(
        UserError, match=r"no column 'user_id' \(for user_id\); it has reviewerID, asin, unixReviewTime"
    ):
        import_table(tmp_path / "t.jsonl")
    for name, line, absent in (("title", '{"asin": "a", "name": "Ant"}', "title"), ("x", '{"title": "Ant"}', "asin")):
        (tmp_path / "i.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=f"i.jsonl has no column '{absent}'; it has"):
            import_items(tmp_path / "i.jsonl", "asin", "title")
    (tmp_path / "i.jsonl").write_text('{"artist": "Ant", "item_id": 7}\n')
    assert import_items(tmp_path / "i.jsonl", "artist", "artist").rows(named=True) == [
        {"item_id": "Ant", "title": "Ant"}
    ]


@pytest.mark.parametrize("ending", ["ndjson", "tab", "jsonl.parquet", "tsv.csv", "JSONL"])
def test_items_are_told_apart_by_the_same_endings_as_interactions(tmp_path, ending):
    path, frame = tmp_path / f"items.{ending}", pl.DataFrame({"item_id": ["a", "b"], "title": ["Ant", "Bee"]})
    writers = {"tab": lambda: frame.write_csv(path, separator="\t"), "tsv.csv": lambda: frame.write_csv(path)}
    writers |= {"jsonl.parquet": lambda: frame.write_parquet(path)}
    writers.get(ending, lambda: frame.write_ndjson(path))()
    assert import_items(path, "item_id", "title").rows() == [("a", "Ant"), ("b", "Bee")]


@pytest.mark.parametrize("name", ["shards", "shards.parquet"])
def test_a_folder_of_shards_is_one_sentence(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder: join the files in it into one"):
        import_table(tmp_path / name)
