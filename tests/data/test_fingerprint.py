"""A split's digest sees every value, and nothing else."""

import pyarrow as pa

from r2ec_trl.data.fingerprint import sha256_of

TABLE = pa.table({"id": ["a", "bc", None], "list": [["x"], [], ["y", "z"]], "n": [1, None, 3]})


def test_batches_order_of_columns_and_widths_do_not_matter():
    whole = sha256_of([TABLE])
    assert whole == sha256_of([TABLE[:1], TABLE[1:]]) == sha256_of([TABLE.select(["n", "id", "list"])])
    large = TABLE.set_column(0, "id", TABLE["id"].cast(pa.large_string()))
    assert sha256_of([large]) == whole


def test_every_change_is_seen():
    changes = [
        TABLE.set_column(0, "id", pa.array(["ab", "c", None])),  # the same bytes, cut elsewhere
        TABLE.set_column(0, "id", pa.array(["a", "bc", ""])),
        TABLE.set_column(1, "list", pa.array([["x"], ["y"], ["z"]])),
        TABLE.set_column(2, "n", pa.array([1, 0, 3])),
        TABLE.rename_columns(["id", "list", "m"]),
        TABLE.take([1, 0, 2]),
    ]
    assert len({sha256_of([table]) for table in [TABLE, *changes]}) == 7


def test_a_part_is_read_from_where_it_begins():
    for start in (0, 1, 2):
        part = TABLE[start : start + 1]
        assert part["n"].chunk(0).offset == start and sha256_of([part]) == sha256_of(
            [pa.table(part.to_pydict(), TABLE.schema)]
        )
