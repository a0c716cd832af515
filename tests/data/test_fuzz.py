"""Fuzzing: whatever the bytes, an importer gives rows or one sentence, never another error."""

import gzip
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from r2ec_trl.data import import_amazon, import_movielens, import_recbole, import_sequences, import_table
from r2ec_trl.data.text import clean_text
from r2ec_trl.errors import UserError

pytestmark = pytest.mark.slow
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

CSV = b"user_id,item_id,rating,timestamp\nu,i,5,1\nv,j,4.5,20\n"
JSONL = b'{"user_id": "u", "item_id": "i", "rating": 5, "timestamp": 1}\n{"user_id": "v", "item_id": "j"}\n'
SEQUENCE = b'{"user_id": "u", "history": ["i"], "target": "j", "timestamp": 1}\n'
ITEMS = b'{"item_id": "i", "title": "I"}\n{"item_id": "j", "title": "J", "notes": ["a", 1]}\n'
META = b'{"parent_asin": "i", "title": "I", "description": ["a"], "price": 2.5}\n'
RATINGS = b"user_id,parent_asin,rating,timestamp\nu,i,5.0,1588687728923\n"
INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t5\t1\n"
DATA, DAT = b"1\t1\t5\t881250949\n", b"1::1::5::978300760\n"

pieces = st.sampled_from(
    [
        b'"',
        b",",
        b"\n",
        b"\r\n",
        b"\t",
        b"::",
        b"{",
        b"}",
        b"[",
        b"]",
        b"null",
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        b"-1",
    ]
    + [b"1e400", b"NaN", b"9" * 30, b'"\\ud800"', b"\\", b"{}", b'{"user_id":', b" ", b"\x1f", b"\xc3", b"true", b"'"]
)


@st.composite
def damaged(draw, whole):
    """The file with bytes cut out, doubled, replaced, or strange ones put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 12)))
        kind = draw(st.sampled_from(["cut", "put", "replace", "double"]))
        if kind == "cut":
            del data[at:end]
        elif kind == "put":
            data[at:at] = draw(st.one_of(pieces, st.binary(max_size=8)))
        elif kind == "replace":
            data[at:end] = draw(st.one_of(pieces, st.binary(max_size=8)))
        else:
            data[at:at] = data[at:end] * draw(st.integers(1, 3))
    return bytes(data)


def survives(read):
    """Rows or one sentence, strictly and with bad rows skipped."""
    for skip in (False, True):
        try:
            source = read(skip)
        except UserError as error:
            assert "\n" not in str(error), str(error)
            continue
        frame = source["train"].to_polars() if isinstance(source, dict) else source.interactions
        assert frame.height and not any(frame.null_count().row(0))


@FUZZ
@given(st.one_of(damaged(CSV), st.binary(max_size=80)))
@example(b'user_id,item_id,rating,timestamp\n"\n')
def test_csv(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    survives(lambda skip: import_table(tmp_path / "t.csv", skip_bad_rows=skip))


@FUZZ
@given(st.one_of(damaged(JSONL), st.binary(max_size=80)))
def test_jsonl(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    survives(lambda skip: import_table(tmp_path / "t.jsonl", skip_bad_rows=skip))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@FUZZ
@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(("user_id", "history", "target", "timestamp"), json_values))
    )
)
def test_sequences_of_any_json(tmp_path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, content in {"train": text, "valid": SEQUENCE, "test": SEQUENCE, "items": ITEMS}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    survives(lambda skip: import_sequences(tmp_path, skip_bad_rows=skip))


@FUZZ
@given(damaged(SEQUENCE), damaged(ITEMS))
def test_sequences(tmp_path, rows, items):
    for name, content in {"train": rows, "valid": SEQUENCE, "test": SEQUENCE, "items": items}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    survives(lambda skip: import_sequences(tmp_path, skip_bad_rows=skip))


@FUZZ
@given(damaged(RATINGS), damaged(META))
def test_amazon(tmp_path, ratings, metadata):
    (tmp_path / "X.csv").write_bytes(ratings)
    (tmp_path / "meta_X.jsonl").write_bytes(metadata)
    survives(lambda skip: import_amazon("X", tmp_path, skip_bad_rows=skip))


@FUZZ
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("parent_asin", "title", "description", "price"), json_values))
)
def test_amazon_metadata_of_any_json(tmp_path, item):
    (tmp_path / "X.csv").write_bytes(RATINGS)
    (tmp_path / "meta_X.jsonl").write_bytes(META + json.dumps(item).encode())
    survives(lambda skip: import_amazon("X", tmp_path, skip_bad_rows=skip))


@FUZZ
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(1, 255))
def test_gzip(tmp_path, extra, at, flip):
    packed = bytearray(gzip.compress(CSV * 3))
    packed[at % len(packed)] ^= flip
    (tmp_path / "t.csv.gz").write_bytes(bytes(packed) + extra)
    survives(lambda skip: import_table(tmp_path / "t.csv.gz", skip_bad_rows=skip))


@FUZZ
@given(damaged(INTER))
def test_recbole(tmp_path, content):
    (tmp_path / "x.inter").write_bytes(content)
    survives(lambda skip: import_recbole(tmp_path, skip_bad_rows=skip))


@FUZZ
@example(DATA, b"1|Toy Story (1995)|01-Jan-1995||http://x|0|1\n", b"\n")
@example(DATA, b"1|Toy Story (1995)|01-Jan-1995||http://x|0|1\n", b"Drama|0\nDrama|1\n")
@given(damaged(DATA), damaged(b"1|Toy Story (1995)|01-Jan-1995||http://x|0|1\n"), damaged(b"unknown|0\nDrama|1\n"))
def test_movielens_100k(tmp_path, ratings, items, genres):
    for name, content in {"u.data": ratings, "u.item": items, "u.genre": genres}.items():
        (tmp_path / name).write_bytes(content)
    survives(lambda skip: import_movielens(tmp_path, skip_bad_rows=skip))


@FUZZ
@given(damaged(DAT), damaged(b"1::\xc9lan (1996)::Drama|War\n"))
def test_movielens_1m(tmp_path, ratings, items):
    for name, content in {"ratings.dat": ratings, "movies.dat": items}.items():
        (tmp_path / name).write_bytes(content)
    survives(lambda skip: import_movielens(tmp_path, skip_bad_rows=skip))


@FUZZ
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=30))
def test_parquet(tmp_path, at, put):
    path = tmp_path / "t.parquet"
    pl.DataFrame({"user_id": ["u", "v"], "item_id": [1, 2], "timestamp": [1, 2], "rating": [1.0, 2.0]}).write_parquet(
        path
    )
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : at + len(put)] = put
    path.write_bytes(data)
    survives(lambda skip: import_table(path, skip_bad_rows=skip))


@FUZZ
@given(st.text(max_size=60), st.integers(1, 5))
def test_cleaning(text, words):
    once = clean_text(pl.Series("text", [text]), words)
    assert clean_text(once, words).equals(once, null_equal=True)
    assert once.item() is None or (once.item() == once.item().strip() and len(once.item().split(" ")) <= words)
