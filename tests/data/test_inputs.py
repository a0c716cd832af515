"""What people really have: each file of this kind gives the right rows or one sentence that names place and cure."""

import bz2
import gzip
import json
import lzma
import tarfile
import time
import zipfile
from collections import Counter
from datetime import date, datetime, timedelta
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r2ec_trl import progress
from r2ec_trl.data import import_amazon, import_recbole, import_sequences, import_table
from r2ec_trl.data.events import sort_events
from r2ec_trl.data.item_filter import ItemFilter, filter_items
from r2ec_trl.data.sources import KINDS, kind_of
from r2ec_trl.data.text import clean_text
from r2ec_trl.errors import UserError

LOG = "user_id,item_id,rating,timestamp\nu,1,5,10\nu,2,4,20\nv,1,3,30\n"
ROWS = [("u", "1", 5.0, 10), ("u", "2", 4.0, 20), ("v", "1", 3.0, 30)]


@pytest.fixture
def table(tmp_path):
    """`table(log, items)` reads both; bytes are written as they are, parquet from a dictionary."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, dict | pa.Table):
            pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def read(log=LOG, items=None, log_name="log.csv", items_name="items.csv", **settings):
        items = None if items is None else write(items_name, items)
        return import_table(write(log_name, log), items, **settings)

    return read


@pytest.mark.parametrize(
    "log",
    [
        LOG.replace(",", ", "),
        LOG.replace("\n", "\r\n"),
        "\ufeff" + LOG,
        LOG.replace("1,", "1  ,").replace("u,", " u ,"),
        LOG.replace("u,", '"u",'),
        LOG.replace("10", "1e1").replace("20", "20.0").replace("5,", "+5,"),
    ],
)
def test_spellings_of_the_same_log(table, log):
    assert table(log).interactions.rows() == ROWS


def test_backslash_quotes_break_their_own_row_alone(table):
    items = 'item_id,title,brand\n1,"A \\" odd one",x\n2,Two,y\n3,"B \\"",z\n4,"Five"" long",w\n5,5" tape,v\n'
    with pytest.raises(UserError, match="items.csv, row 1: not a record of quoted fields .*; mend the row, or pass"):
        table(items=items)
    source = table(items=items, skip_bad_rows=True)
    assert source.items.rows() == [("2", "Two", "y"), ("4", 'Five" long', "w"), ("5", '5" tape', "v")]
    assert source.dropped == {"row that cannot be read": 2}


def test_rows_swallowed_by_a_legal_quote_are_told(table, caplog):
    items = 'item_id,title,brand\n1,"One,x\n2,Two,y\n3,Three",z\n'
    assert table(items=items).items["title"].to_list() == ["One,x\n2,Two,y\n3,Three"]
    assert "row 1: 3 lines that all look like rows; check its quotes" in caplog.text


@pytest.mark.parametrize("head, row", [(",item_id,title", "7,{},T{}"), ("Unnamed: 0,item_id,title", "7,{},T{}")])
def test_pandas_index_in_csv(table, head, row, caplog):
    source = table(items=head + "\n" + "\n".join(row.format(n, n) for n in (1, 2)))
    assert source.items.rows() == [("1", "T1"), ("2", "T2")]
    assert "is an index without a name and is left out" in caplog.text


def test_pandas_index_in_parquet(table):
    frame = pl.DataFrame({"item_id": [1, 2], "title": ["T1", "T2"], "__index_level_0__": [8, 9]})
    assert table(items=frame.to_arrow(), items_name="items.parquet").items.rows() == [("1", "T1"), ("2", "T2")]


def test_ids_as_floats(table):
    """A float column of whole numbers is an integer column with a gap; as text the two are different ids."""
    items = {"item_id": [1.0, 2.0], "title": ["One", "Two"]}
    assert table(items=items, items_name="items.parquet").items["item_id"].to_list() == ["1", "2"]
    with pytest.raises(
        UserError, match=r"No item of .*log.csv is in the catalogue: '1' is one of its ids, '1.0' is one"
    ):
        table(items="item_id,title\n1.0,One\n2.0,Two\n")
    with pytest.raises(UserError, match="write the ids in one way"):
        table(LOG.replace("1,", "B01,"), items="item_id,title\n7,Seven\n")


def test_missing_values_are_no_text(table):
    lines = [
        {"item_id": 1, "title": float("nan"), "brand": "acme"},
        {"item_id": 2, "title": "Two", "brand": float("nan")},
    ]
    items = "\n".join(map(json.dumps, lines)).encode()
    assert table(items=items, items_name="items.jsonl").items.rows() == [("1", None, "acme"), ("2", "Two", None)]
    frame = pl.DataFrame({"item_id": ["1", "2"], "title": ["None", "Two"], "price": [float("nan"), 2.5]})
    assert table(items=frame.to_arrow(), items_name="i.parquet").items.rows() == [("1", None, None), ("2", "Two", 2.5)]
    for word in ("NaN", "nan", "<NA>", "null", "NA"):
        assert table(items=f"item_id,title\n1,{word}\n2,Two\n").items["title"].to_list() == [None, "Two"]
        with pytest.raises(UserError, match="row 3 has no user_id"):
            table(LOG.replace("v", word))
    with pytest.raises(UserError, match=r"row 1 has a rating that is no number"):
        table(
            '{"user_id": 1, "item_id": 2, "rating": NaN, "timestamp": 1}\n{"user_id": 1, "item_id": 2, "rating": 1, '
            '"timestamp": 2}\n',
            log_name="log.jsonl",
        )


def test_the_titled_copy_of_an_item_is_kept(table):
    source = table(items="item_id,title,brand\n1,,first\n1,One,second\n1,Uno,third\n2,Two,x\n2,Zwei,y\n")
    _, items = filter_items(sort_events(source), source.items, source.items, ItemFilter(), dropped := source.dropped)
    assert items.rows() == [("1", "One", "second"), ("2", "Two", "x")]
    assert dropped["item listed again in the metadata"] == 3


@pytest.mark.parametrize("unit, ticks", [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units(table, tmp_path, unit, ticks):
    time = 1_600_000_000
    log = (
        LOG.replace("10", str(time * ticks + ticks // 2))
        .replace("20", str(time * ticks))
        .replace("30", str(time * ticks))
    )
    source = table(log, timestamp_unit=unit)
    assert source.ticks_per_second == ticks and source.interactions["timestamp"][0] // ticks == time
    (tmp_path / "x.inter").write_text(log.replace(",", "\t").replace("user_id", "user_id:token"))
    assert import_recbole(tmp_path, timestamp_unit=unit).interactions["timestamp"][0] // ticks == time
    dates = {"user_id": ["u"], "item_id": ["i"], "timestamp": [datetime(2020, 9, 13, 12, 26, 40)]}
    assert table(dates, log_name="log.parquet", timestamp_unit=unit).interactions["timestamp"][0] == time * ticks
    if unit != "s":
        with pytest.raises(UserError, match=rf"after the year 5000 \(is --timestamp_unit right\? {unit} would fit\)"):
            table(log)


def test_an_unknown_unit(table):
    with pytest.raises(UserError, match="--timestamp_unit 'hours' is unknown: choose one of s, ms, us, ns"):
        table(timestamp_unit="hours")


PACKED = {
    "log.csv.zip": "is a zip archive: unpack it first .an Excel workbook: save it as CSV",
    "log.csv.xz": "is a xz archive",
    "log.csv.bz2": "is a bzip2 archive",
    "log.tar": "is a tar archive",
    "log.tar.gz": "is a tar archive",
    "twice.csv.gz": "is packed by gzip here: unpack it",
    "parquet.csv": "is a parquet file: name it .parquet",
    "utf16.csv": "is UTF-16 text: save it as UTF-8",
    "utf16le.csv": "is UTF-16 text or no text at all: save it as UTF-8",
    "feather.csv": "is an Arrow .Feather. file: save it as .parquet",
    "utf32.csv": "is UTF-32 text: save it as UTF-8",
    "latin.csv": "row 1: not utf-8 text",
    "mac.csv": "header line: a carriage return inside a line",
}


@pytest.mark.parametrize("name", PACKED)
def test_files_of_another_kind(tmp_path, name):
    path, text = tmp_path / name, LOG.encode()
    (tmp_path / "log.csv").write_bytes(text)
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "log.csv", "log.csv")
    elif "tar" in name:
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            archive.add(tmp_path / "log.csv", "log.csv")
    elif name == "parquet.csv":
        pq.write_table(pa.table({"user_id": ["u"]}), path)
    elif name == "feather.csv":
        pl.DataFrame({"user_id": ["u"]}).write_ipc(path)
    else:
        coded = {"utf16": "utf-16", "utf16le": "utf-16-le", "utf32": "utf-32"}.get(name.split(".")[0], "utf-8")
        content = LOG.encode(coded)
        if name == "latin.csv":
            content = LOG.replace("u,1", "ü,1").encode("latin-1")
        content = content.replace(b"\n", b"\r") if name == "mac.csv" else content
        pack = {"xz": lzma.compress, "bz2": bz2.compress, "gz": lambda data: gzip.compress(gzip.compress(data))}
        path.write_bytes(pack.get(name.rsplit(".")[-1], bytes)(content))
    for skip in (False, True):
        if skip and name == "latin.csv":
            assert import_table(path, skip_bad_rows=True).interactions.height == 2
            continue
        with pytest.raises(UserError, match=PACKED[name]) as caught:
            import_table(path, skip_bad_rows=skip)
        assert name in str(caught.value) and "\n" not in str(caught.value)


TYPES = {
    "struct": (pa.array([{"Brand": "b", "Weight": None}, None]), ['{"Brand": "b", "Weight": null}', None]),
    "lists of lists": (pa.array([[["a"], ["b"]], []]), ["a b", None]),
    "map": (pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())), ['["k", 1]', None]),
    "decimal": (pa.array([Decimal("1.50"), None]), ["1.50", None]),
    "dictionary": (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    "bool": (pa.array([True, None]), [True, None]),
    "list": (pa.array([["a", "b"], None]), [["a", "b"], None]),
    "numbers": (pa.array([[1, 2], None]), ["1 2", None]),
    "date": (pa.array([date(2020, 1, 2), None]), [date(2020, 1, 2), None]),
    "null": (pa.nulls(2), [None, None]),
    "half": (pa.array([1.5, 2.0], pa.float32()).cast(pa.float16()), [1.5, 2.0]),
    "binary": (
        pa.array([b"a", b"b"]),
        "column 'it' holds binary: write it as text or numbers, or leave the column out",
    ),
    "duration": (pa.array([timedelta(1), None]), r"column 'it' holds duration\[us\]"),
    "nested bytes": (pa.array([{"a": b"x"}, None]), "column 'it' holds struct<a: binary>"),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_of_parquet(table, name):
    values, expected = TYPES[name]
    items = pa.table({"item_id": [1, 2], "title": ["One", "Two"], "it": values})
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            table(items=items, items_name="items.parquet")
        assert "items.parquet" in str(caught.value)
    else:
        assert table(items=items, items_name="items.parquet").items["it"].to_list() == expected


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp", "rating"])
@pytest.mark.parametrize("value", [{"a": 1}, [1], b"x", timedelta(1)], ids=["struct", "list", "bytes", "duration"])
def test_ids_times_and_ratings_have_one_value(table, column, value):
    log = {"user_id": ["u"], "item_id": ["1"], "timestamp": [1], "rating": [1.0]} | {column: [value]}
    with pytest.raises(UserError, match=f"log.parquet: column '{column}' holds .*: write it as text or numbers"):
        table(log, log_name="log.parquet")


def test_names_that_stand_twice(table):
    log = pa.table(
        [pa.array(["u"]), pa.array(["i"]), pa.array([1]), pa.array([2])],
        ["user_id", "item_id", "timestamp", "timestamp"],
    )
    with pytest.raises(UserError, match="log.parquet names column 'timestamp' twice: rename one"):
        table(log, log_name="log.parquet")


def test_keys_that_come_late(table):
    log = '{"user_id": 1, "item_id": 2, "timestamp": 1}\n' * 3
    assert table(log, log_name="log.jsonl").interactions.columns == ["user_id", "item_id", "timestamp"]


def test_items_whose_own_columns_are_called_item_id_and_title(table):
    items = b'{"sku": 1, "item_id": "x9", "name": "One", "title": "Herr"}\n{"sku": 2, "name": "Two", "": 5}\n'
    log = LOG.replace("item_id", "sku")
    found = table(log, items, items_name="items.jsonl", item_column="sku", title_column="name").items
    assert found.rows() == [("1", "One"), ("2", "Two")]


TIME = 1_600_000_000


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"timestamp": TIME * 1000},
            "row 1 has a timestamp that is no time in whole seconds .milliseconds. divide by 1000.",
        ),
        (
            {"history_timestamps": [TIME, TIME * 1000]},
            "row 1 has a history_timestamps that is no time in whole seconds",
        ),
        ({"history_timestamps": [-1, TIME]}, "row 1 has a history_timestamps that is no time"),
        ({"timestamp": 1.5}, "row 1 has a timestamp that does not fit"),
        ({"history_ratings": [float("nan"), 1]}, "row 1 has a history_ratings that does not fit"),
        ({"history_ratings": [1, "inf"]}, "row 1 has a history_ratings that does not fit"),
        ({"history_ratings": float("nan")}, "row 1 has a history_ratings that does not fit"),
        ({"user_id": float("nan")}, "row 1 has no user_id"),
        ({"target": None}, "row 1 has no target"),
    ],
)
def test_sequences_are_checked_as_tables_are(tmp_path, change, sentence):
    good = {"user_id": "u", "history": ["a", "b"], "target": "c", "timestamp": TIME}
    good |= {"history_ratings": [1, 2.5], "history_timestamps": [TIME - 2, TIME - 1]}
    for name in ("train", "valid", "test"):
        rows = [{**good, **(change if name == "train" else {})}, good]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "items.jsonl").write_text("".join(f'{{"item_id": "{n}", "title": "{n}"}}\n' for n in "abc"))
    with pytest.raises(UserError, match=sentence) as caught:
        import_sequences(tmp_path)
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value)
    dropped = Counter()
    assert len(import_sequences(tmp_path, skip_bad_rows=True, dropped=dropped)["train"]) == 1
    assert sum(dropped.values()) == 1


def test_deep_json_is_one_bad_row(table):
    deep = b'{"item_id": 1, "title": "One", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    good = b'{"item_id": 2, "title": "Two"}\n'
    with pytest.raises(UserError, match="items.jsonl, row 1: the JSON is nested too deeply; mend the line"):
        table(items=deep + good, items_name="items.jsonl")
    source = table(items=deep + good, items_name="items.jsonl", skip_bad_rows=True)
    assert source.items["item_id"].to_list() == ["2"] and sum(source.dropped.values()) == 1


def test_lines_and_fields_without_end(table, monkeypatch):
    import r2ec_trl.data.sources.jsonl as jsonl

    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    for name, content in {"log.csv": LOG + "u," + "9" * (12 << 20), "log.jsonl": '{"a": "' + "x" * (12 << 20)}.items():
        with pytest.raises(UserError, match=f"{name}, row .* is a line of over 1 MiB: is this a file of lines"):
            table(content, log_name=name)
    with pytest.raises(UserError, match="row 3: not a record of quoted fields .a quote that does not end."):
        table(LOG.replace("v,1", 'v,"1') + "w,1,1,40\n" * 200_000)


STALLING = {
    "scripts": "<script>" * 100_000,
    "comments": "<!--" * 100_000,
    "styles": "<style>a</style" * 50_000,
    "tags": "<a" * 200_000,
    "entities": "&" + "amp;" * 100_000,
    "numbers": "&" + "#38;" * 100_000,
    "nested entities": "&am" * 50_000 + "p;" * 50_000,
    "nested numbers": "&#" * 50_000 + "38;" * 50_000,
    "escaped tags": "&lt;b&gt;" * 50_000,
}


@pytest.mark.parametrize("name", STALLING)
def test_text_that_would_stall_is_cleaned_in_bounded_time(name):
    start = time.process_time()
    once = clean_text(pl.Series("text", [STALLING[name]]))
    assert time.process_time() - start < 5  # quadratic: minutes
    assert clean_text(once).equals(once, null_equal=True)


def test_a_source_is_a_file_and_a_name():
    for name in KINDS:
        kind = kind_of(name)
        assert kind.read.__module__ == f"r2ec_trl.data.sources.{name}" and "skip_bad_rows" in kind.parameters
    with pytest.raises(UserError, match="--source 'netflix' is unknown: choose one of amazon, movielens"):
        kind_of("netflix")


def test_amazon_items_that_nobody_bought(tmp_path):
    (tmp_path / "Toys.csv").write_text("user_id,parent_asin,rating,timestamp\nu,B1,5,1588687728923\n")
    (tmp_path / "meta_Toys.jsonl").write_text('{"parent_asin": "X1", "title": "X"}\n')
    with pytest.raises(UserError, match=r"No item of Toys \(5core\) is in the catalogue: 'B1' is one of its ids"):
        import_amazon("Toys", tmp_path)


def test_long_reading_is_reported(table):
    seen = []
    progress.watch(watcher := lambda *told: seen.append(told))
    try:
        source = table(LOG + "w,1,5,40\n" * 2_000_000)
    finally:
        progress.unwatch(watcher)
    assert source.interactions.height == 2_000_003 and {told[0] for told in seen} == {"reading log.csv, MiB"}
    assert seen[-1][1:] == (17, 17) and len(seen) > 2 and sorted(seen) == seen
