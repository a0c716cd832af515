"""
The fast path of each reader equals its plain twin on every input, and every row is given out or counted.

By hand, a million inputs: `python tests/data/test_twins.py 1000000`.
"""

import random
import sys
from collections import Counter
from contextlib import contextmanager

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import r2ec_trl.data.sources.delimited as delimited
import r2ec_trl.data.sources.jsonl as jsonl
from r2ec_trl.data.sources.delimited import Dialect, read_table
from r2ec_trl.data.sources.jsonl import read_jsonl
from r2ec_trl.errors import UserError

NUMBERS = (
    "1e16 -0.0 1234567890123456.0 007 +5 1_000 1E5 -0 0.1 1e-7 1e400 12345678901234567890 5. .5 1.50 1e300".split()
)
NUMBERS += [
    " 3 ",
    "123456789012345678901234567890123456789012",
    "-9223372036854775809",
    "0.30000000000000004",
    "5e-324",
]
CSV = [*NUMBERS, *('a b , , , \n \n \n \r \r\n " " "" \\" é 😀 :: \t | \x1f nan [ {').split(" "), " ", "\x00", "\x0b"]
CSV_PIECES = [piece.encode() for piece in CSV] + [b"\xff", b"\xc3", b"\xef\xbb\xbf", b'"x\ny"', b"a,b,c\n", b"1,2\n"]
KEYS = ['"a"', '"b"', '"l"', '"other"', '"\\u0061"', '""']
VALUES = [
    *NUMBERS,
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    '"a"',
    '"[x]"',
    '"{"',
    '"\\ud800"',
]
VALUES += [
    '"\\udc00"',
    '"\\ud83d\\ude00"',
    '"\\\\ud800"',
    '"\\\\ud800\\udc00"',
    '"\\n\\u0000"',
    '"é"',
    '" 3 "',
    "[1.0, null]",
]
VALUES += [
    '["a", 1e16, "[b]"]',
    '{"k": [1.0, {"j": "\\"é\\n"}], "k": NaN}',
    '["\\ud800"]',
    '[["x"]]',
    "[NaN]",
    '"\t"',
    "'x'",
]
BREAKS = [
    "",
    " ",
    "{",
    "}",
    "[1]",
    "5",
    "null",
    "\ufeff",
    "\r",
    ",",
    '{"a": 1} {"a": 2}',
    '{"a": 1,}',
    "\x0b",
    '{"a": 1}x',
]
CSV_DIALECTS = [Dialect(), Dialect(quoted=False), Dialect("::", False), Dialect("\t", False, encoding="latin-1")]
SCHEMA = {"a": pl.String, "b": pl.String, "l": pl.List(pl.String)}


@contextmanager
def reading(module, block, fast=True):
    """A reader that finds this block in every file; without its fast path if so asked."""
    saved = module.blocks, module._fast
    module.blocks = lambda path, size=0: iter([(1, block)] if block else [])
    module._fast = saved[1] if fast else lambda *arguments: None
    try:
        yield
    finally:
        module.blocks, module._fast = saved


def outcome(module, block, read, skip, fast):
    """The rows and what was counted, or the sentence."""
    skipped = Counter() if skip else None
    with reading(module, block, fast):
        try:
            frames = [frame for frame in read(skipped) if frame.height]
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
    rows = pl.concat(frames).select(sorted(frames[0].columns)).rows() if frames else []
    return rows, sum(skipped.values()) if skip else 0


def check(module, block, read):
    """Both paths give the same, strictly and with bad rows skipped; returns what the latter gives."""
    for skip in (False, True):
        fast, plain = (outcome(module, block, read, skip, fast) for fast in (True, False))
        assert fast == plain, (block, fast, plain)
    return fast


def check_csv(block, dialect):
    names = {name: name for name in "abc"}
    header = dialect.separator.join("abc").encode() + b"\n"
    found = check(
        delimited, header + block, lambda skipped: read_table("t.csv", names, dialect=dialect, skipped=skipped)
    )
    assert not isinstance(found, str), (block, found)
    rows, counted = found
    lines = block.removesuffix(b"\n").split(b"\n") if block else []
    inside = [part for row in rows for value in row if isinstance(value, str) for part in value.split("\n")[1:]]
    between = sum(
        not part.strip("\r")
        for row in rows
        for value in row
        if isinstance(value, str)
        for part in value.split("\n")[1:-1]
    )
    empty = sum(not line.strip(b"\r") for line in lines) - between
    assert len(rows) + len(inside) + counted + empty == len(lines), (block, dialect, found)


def check_jsonl(block):
    found = check(
        jsonl, block, lambda skipped: read_jsonl("t.jsonl", SCHEMA, skip_bad_rows=skipped is not None, dropped=skipped)
    )
    rows, counted = found
    assert len(rows) + counted == sum(bool(line.strip()) for line in block.split(b"\n")), (block, found)


def json_line(pairs):
    return "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"


json_lines = st.one_of(
    st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=4).map(json_line),
    st.sampled_from(BREAKS),
)
MANY = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(MANY, max_examples=300)


def csv_inputs(test):
    return given(st.lists(st.sampled_from(CSV_PIECES), max_size=25).map(b"".join), st.sampled_from(CSV_DIALECTS))(test)


def jsonl_inputs(test):
    return given(st.lists(json_lines, max_size=5).map(lambda lines: "\n".join(lines).encode()))(test)


@SOME
@example(b'1,"A \\" odd one",x\n2,B,x\n3,"C \\" odd",x\n', Dialect())
@example(b'1,"A,x\n2,B,x\n3,"C,x\n4,D,x\n', Dialect())
@example(b"u,v,w\r\nu,v,w\r", Dialect())
@example(b'u,v,w\r\n"u",v,w\r', Dialect())
@example(b"a,b,c\n1,2,3,", Dialect(quoted=False))
@csv_inputs
def test_csv(block, dialect):
    check_csv(block, dialect)


@SOME
@example(b'{"a": 1234567890123456.0, "b": 1e16}\n{"a": -0.0}\n{\n')
@example(b'{"a": "\\\\ud800\\udc00"}')
@jsonl_inputs
def test_jsonl(block):
    check_jsonl(block)


@pytest.mark.slow
@MANY
@csv_inputs
def test_many_csv(block, dialect):
    check_csv(block, dialect)


@pytest.mark.slow
@MANY
@jsonl_inputs
def test_many_jsonl(block):
    check_jsonl(block)


def by_hand(count, seed):
    """Random inputs without hypothesis, which takes longer than the readers."""
    dice = random.Random(seed)
    delimited.logger.disabled = True
    for number in range(count):
        if number % 2:
            check_csv(b"".join(dice.choices(CSV_PIECES, k=dice.randrange(40))), dice.choice(CSV_DIALECTS))
        else:
            lines = [
                (
                    dice.choice(BREAKS)
                    if dice.random() < 0.1
                    else json_line([(dice.choice(KEYS), dice.choice(VALUES)) for _ in range(dice.randrange(4))])
                )
                for _ in range(dice.randrange(1, 5))
            ]
            check_jsonl("\n".join(lines).encode())
        if number % 50_000 == 0:
            print(number, flush=True)
    print(f"{count:,} inputs: both paths equal, every row given out or counted")


if __name__ == "__main__":
    by_hand(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
