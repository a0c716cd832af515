"""Lines of JSON as text, whatever block they fall into."""

import gzip
from collections import Counter

import polars as pl
import pytest

from r2ec_trl.data.sources.jsonl import ROW, read_jsonl
from r2ec_trl.errors import UserError

LINES = b'{"a": "x", "b": 1}\n{"b": 2.5, "a": null}\n{"c": [1]}\n'
SCHEMA = {"a": pl.String, "b": pl.String}


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_values_come_as_text_with_their_line(tmp_path, name, block_bytes):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    frame = pl.concat(read_jsonl(tmp_path / name, SCHEMA, block_bytes=block_bytes))
    assert frame.select(ROW, "a", "b").rows() == [(1, "x", "1"), (2, None, "2.5"), (3, None, None)]


def test_a_broken_line_is_named_or_counted(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(LINES + b'{"a": \n' + LINES)
    with pytest.raises(UserError, match="t.jsonl.*4"):
        list(read_jsonl(tmp_path / "t.jsonl", SCHEMA))
    dropped = Counter()
    frame = pl.concat(read_jsonl(tmp_path / "t.jsonl", SCHEMA, skip_bad_rows=True, dropped=dropped))
    assert frame.height == 6 and sum(dropped.values()) == 1 and frame[ROW].to_list() == [1, 2, 3, 5, 6, 7]
