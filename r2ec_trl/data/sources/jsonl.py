"""Read JSON lines in blocks: gzip or plain, damage located by file and row, memory bounded by the block."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import polars as pl

from r2ec_trl.errors import UserError

BLOCK_BYTES = 8 << 20
UNREADABLE = "row that cannot be read"
ROW = "__row__"  # no source has a column of this name
Schema = dict[str, Any]  # column -> pl.String or pl.List(pl.String)


def read_jsonl(
    path: str | os.PathLike[str],
    schema: Schema,
    *,
    skip_bad_rows: bool = False,
    dropped: Counter[str] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[pl.DataFrame]:
    """
    Frames of the chosen columns of a `.jsonl` or `.jsonl.gz` file, with the line number (from 1) in column [`ROW`].

    Every value comes as text (or a list of text), an absent key as null: what a column must hold is for the importer
    to say, which then knows the row of a wrong value.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        schema (`dict`):
            Columns to read, each `pl.String` or `pl.List(pl.String)`.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave out lines that are no JSON objects and count them in `dropped`, instead of raising.
        dropped (`Counter`, *optional*):
            Where such lines are counted.
    """
    skipped = dropped if skip_bad_rows and dropped is not None else (Counter() if skip_bad_rows else None)
    for first_row, block in blocks(path, block_bytes):
        frame = _fast(block, schema)
        if frame is None:
            yield _line_by_line(block, schema, first_row, path, skipped)
        else:
            yield frame.with_columns(pl.int_range(first_row, first_row + frame.height, dtype=pl.Int64).alias(ROW))


def open_maybe_gzip(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading bytes, unpacking gzip (told by its first bytes, not by its name)."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check the path.") from error
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


def blocks(path: str | os.PathLike[str], block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Pairs of the first line's number (from 1) and the bytes of whole lines; the next block is read meanwhile."""
    first_row, rest = 1, b""
    with open_maybe_gzip(path) as file, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.read, block_bytes)
        while True:
            try:
                read = reading.result()
            except (OSError, EOFError, zlib.error) as error:
                row = first_row + rest.count(b"\n")
                raise UserError(
                    f"{path} is damaged after row {row - 1} ({' '.join(str(error).split())}): fetch the file again."
                ) from error
            if read:
                reading = pool.submit(file.read, block_bytes)
            end = read.rfind(b"\n") + 1
            if read and not end:
                rest += read
                continue
            block, rest = rest + read[:end], read[end:]
            if block:
                yield first_row, block
            first_row += block.count(b"\n")
            if not read:
                return


def _fast(block: bytes, schema: Schema) -> pl.DataFrame | None:
    """The block by polars' own parser, or None where it refuses a line or the lines cannot be numbered."""
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        frame = pl.read_ndjson(io.BytesIO(block), schema=schema)
    except pl.exceptions.PolarsError:
        return None
    return frame if frame.height == lines else None


def _line_by_line(
    block: bytes, schema: Schema, first_row: int, path: str | os.PathLike[str], skipped: Counter[str] | None
) -> pl.DataFrame:
    """The same by Python's parser, which says which line is wrong: only for blocks that polars refuses."""
    columns: dict[str, list] = {name: [] for name in schema}
    numbers = []
    for row, line in enumerate(block.split(b"\n"), start=first_row):
        if not line.strip():
            continue
        try:
            values = _as_schema(parse_object(line), schema)
        except ValueError as error:
            if skipped is None:
                raise UserError(
                    f"{path}, row {row}: {error}; mend the line, or pass --skip_bad_rows to leave such rows out "
                    "and count them."
                ) from error
            skipped[UNREADABLE] += 1
            continue
        for name, value in values.items():
            columns[name].append(value)
        numbers.append(row)
    return pl.DataFrame({**columns, ROW: numbers}, schema={**schema, ROW: pl.Int64})


def listing(names: Iterable[str], most: int = 30) -> str:
    """Names from a file for a sentence: in one line, and not without end."""
    shown = [" ".join(name.split())[:60] for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object, or a ValueError that fits into a sentence."""
    try:
        value = json.loads(line, object_pairs_hook=_first_of_each)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not a JSON object ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object (a {type(value).__name__})")
    return value


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a repeated key the first value, as polars takes it."""
    return dict(pairs) if len(pairs) < 2 else {**dict(pairs), **dict(reversed(pairs))}


def as_text(value: Any) -> str | None:
    """Any JSON value as text, as polars would give it: numbers plainly, tables and lists as JSON."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is not text
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4000:
        raise ValueError("a number has over a thousand digits")
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _as_schema(value: dict[str, Any], schema: Schema) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, kind in schema.items():
        found = value.get(name)
        if kind == pl.String or found is None:
            row[name] = as_text(found)
        elif isinstance(found, list):
            row[name] = [as_text(part) for part in found]
        elif isinstance(found, str):
            row[name] = [found] if found else []
        else:
            raise ValueError(f"'{name}' holds a {type(found).__name__} instead of a list")
    return row


def reject(
    frame: pl.DataFrame,
    bad: pl.Expr,
    fault: str,
    path: str | os.PathLike[str],
    skipped: Counter[str] | None,
    show: str | None = None,
) -> pl.DataFrame:
    """
    The frame without the rows where `bad` holds: counted in `skipped`, or the first of them is a [`UserError`].

    Args:
        frame (`polars.DataFrame`):
            Rows with their line number in column [`ROW`].
        bad (`polars.Expr`):
            True (or null) marks a bad row.
        fault (`str`):
            What is wrong, to follow "row 17".
        path (`str` or `os.PathLike`):
            The file.
        skipped (`Counter`, *optional*):
            None to raise; otherwise the place to count.
        show (`str`, *optional*):
            Column whose value is quoted in the message.
    """
    mask = frame.select(bad.fill_null(True)).to_series()
    count = int(mask.sum())
    if not count:
        return frame
    if skipped is None:
        first = frame.filter(mask).row(0, named=True)
        value = f" ({str(first[show])[:60]!r})" if show else ""
        raise UserError(
            f"{path}, row {first[ROW]} {fault}{value}; mend the row, or pass --skip_bad_rows to leave such rows out "
            "and count them."
        )
    skipped[f"row that {fault}"] += count
    return frame.filter(~mask)
