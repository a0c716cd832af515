"""SHA-256 of a split's contents, whatever files, batches or machine it was written with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def sha256_of(batches: Iterable[pa.Table]) -> str:
    """
    SHA-256 of the rows of a split, given as tables in row order.

    Each column has a digest of its own over its values in row order (lengths apart from bytes, so that
    `["a", "bc"]` and `["ab", "c"]` differ); the split's digest is over the sorted (name, type, column digest). It does
    not depend on where batches are cut or on the order of columns.
    """
    columns: dict[str, tuple[str, list]] = {}
    for batch in batches:
        for name in batch.column_names:
            parts = columns.setdefault(name, (_plain_type(batch[name].type), []))[1]
            for values in batch[name].chunks:
                _update(parts, values, 0)
    digest = hashlib.sha256()
    for name in sorted(columns):
        kind, parts = columns[name]
        digest.update(f"{name}\0{kind}\0{'/'.join(part.hexdigest() for part in parts)}\n".encode())
    return digest.hexdigest()


def _update(parts: list, values: pa.Array, depth: int) -> None:
    """One running digest a nesting level: lengths or validity (a null has length -1), then the level below."""
    while len(parts) < depth + 2:
        parts.append(hashlib.sha256())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        parts[depth].update(_bytes(pc.fill_null(pc.list_value_length(values), -1).cast(pa.int64())))
        _update(parts, pc.list_flatten(values), depth + 1)
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        parts[depth].update(_bytes(pc.fill_null(pc.binary_length(values), -1).cast(pa.int64())))
        parts[depth + 1].update(_text_bytes(values))
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        parts[depth].update(_bytes(pc.is_valid(values).cast(pa.uint8())))
        parts[depth + 1].update(_bytes(pc.fill_null(values, 0)))
    else:
        for value in values.to_pylist():
            parts[depth].update(f"{value!r}\n".encode())


def _bytes(values: pa.Array) -> memoryview | bytes:
    """The bytes of a fixed-width array without nulls."""
    if not len(values):
        return b""
    width = values.type.bit_width // 8
    return memoryview(values.buffers()[1])[values.offset * width : (values.offset + len(values)) * width]


def _text_bytes(values: pa.Array) -> memoryview | bytes:
    if values.null_count:
        values = pc.fill_null(values, "")
    buffer = values.buffers()[2]
    if buffer is None or not len(values):
        return b""
    offsets = np.frombuffer(values.buffers()[1], np.int32 if pa.types.is_string(values.type) else np.int64)
    return memoryview(buffer)[offsets[values.offset] : offsets[values.offset + len(values)]]


def _plain_type(kind: pa.DataType) -> str:
    """A type's name without field names and without the width of its offsets."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_plain_type(kind.value_type)}>"
    return str(kind).removeprefix("large_")
