"""What text and Parquet files can hold, and what is said of those that cannot be used."""

from collections import Counter
from functools import partial

import pytest

from r2ec_trl.data import import_table
from r2ec_trl.errors import UserError

HEADER = "user_id,item_id,rating,timestamp\n"


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

    monkeypatch.setattr(delimited, "blocks", partial(delimited.blocks, block_bytes=50))
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
