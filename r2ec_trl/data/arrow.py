"""From frames to datasets: one Arrow type a column, whatever the frame was made with."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
from datasets import Dataset

_BATCH_ROWS = 100_000


def to_dataset(frame: pl.DataFrame) -> Dataset:
    """A split from a frame: text as `string`, lists as `list`, in batches whose offsets fit 32 bits."""
    schema = pa.schema([(name, plain_type(kind)) for name, kind in frame.schema.items()])
    tables = [part.to_arrow().cast(schema) for part in frame.iter_slices(_BATCH_ROWS)]
    return Dataset(pa.concat_tables(tables) if tables else schema.empty_table())


def plain_type(kind: pl.DataType) -> pa.DataType:
    """The Arrow type a dataset folder holds for a polars type."""
    if isinstance(kind, pl.List):
        return pa.list_(pa.field("item", plain_type(kind.inner)))  # type: ignore[arg-type]
    if kind == pl.String:
        return pa.string()
    if kind.is_integer():
        return pa.int64()
    if kind.is_float():
        return pa.float32() if kind == pl.Float32 else pa.float64()
    raise TypeError(f"a dataset folder holds text and numbers, not {kind}")
