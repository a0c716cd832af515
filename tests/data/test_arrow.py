"""Frames become datasets of plain types."""

import polars as pl
import pyarrow as pa
import pytest

from r2ec_trl.data.arrow import plain_type, to_dataset


def test_types_are_plain_whatever_the_frame_has():
    frame = pl.DataFrame({"id": ["a"], "n": pl.Series([3], dtype=pl.UInt8), "l": [["x", "y"]], "f": [0.5]})
    dataset = to_dataset(frame)
    assert dataset[0] == {"id": "a", "n": 3, "l": ["x", "y"], "f": 0.5}
    assert [field.type for field in dataset.data.schema] == [
        pa.string(),
        pa.int64(),
        pa.list_(pa.string()),
        pa.float64(),
    ]
    assert len(to_dataset(frame[:0])) == 0


def test_what_no_folder_holds():
    assert plain_type(pl.Float32()) == pa.float32()
    with pytest.raises(TypeError, match="text and numbers"):
        plain_type(pl.Date())
