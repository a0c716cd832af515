"""A hash of texts that is the same on every machine and in every version, for millions of them at once."""

from __future__ import annotations

import numpy as np
import polars as pl

_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def text_hashes(texts: pl.Series) -> np.ndarray:
    """FNV-1a (64 bit) of the UTF-8 bytes of each text, byte position by byte position over all texts."""
    array = texts.to_arrow()
    array = array.cast("large_string") if str(array.type) != "large_string" else array
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    hashes = np.full(len(array), _OFFSET, np.uint64)
    alive = np.flatnonzero(lengths)
    position = 0
    while len(alive):
        hashes[alive] = (hashes[alive] ^ data[offsets[alive] + position]) * _PRIME
        position += 1
        alive = alive[lengths[alive] > position]
    return hashes


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: near values become far."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def share_points(texts: pl.Series) -> np.ndarray:
    """A point of [0, 1) for each text, evenly spread: which texts belong to a share of all."""
    return mix(text_hashes(texts)) / 2.0**64
