"""Read JSON lines in blocks: gzip or plain, damage located by file and row, memory bounded by the block."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, BinaryIO

import polars as pl

from r2ec_trl.errors import UserError
from r2ec_trl.files import finite
from r2ec_trl.progress import report

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 64 << 20  # bytes: a longer one is no table, and would not fit into memory
MOST_KEYS = 1_000  # of all lines together: each is a column of every item
UNREADABLE = "row that cannot be read"
UNNAMED = "unnamed column "  # and its number
ROW = "__row__"  # no source has a column of this name
Schema = dict[str, Any]  # column -> pl.String or pl.List(pl.String)

_UNPACK = "is a {} archive: unpack it first"
_NO_TEXT = {  # what a file that is no text begins with
    b"PK\x03\x04": "is a zip archive: unpack it first (an Excel workbook: save it as CSV)",
    b"PK\x05\x06": _UNPACK.format("zip"),
    b"\xfd7zXZ\x00": _UNPACK.format("xz"),
    b"BZh": _UNPACK.format("bzip2"),
    b"(\xb5/\xfd": _UNPACK.format("zstd"),
    b"7z\xbc\xaf": _UNPACK.format("7z"),
    b"\x1f\x8b": "is packed by gzip here: unpack it",
    b"ARROW1": "is an Arrow (Feather) file: save it as .parquet",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook: save it as CSV",
    b"SQLite format 3": "is a database: export the table as CSV",
    b"PAR1": "is a parquet file: name it .parquet",
    b"\xff\xfe\0\0": "is UTF-32 text: save it as UTF-8",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}
_LONE_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


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
            yield _line_by_line(enumerate(block.split(b"\n"), start=first_row), schema, path, skipped)
            continue
        frame = frame.with_columns(pl.int_range(first_row, first_row + frame.height, dtype=pl.Int64).alias(ROW))
        nested = frame.select(pl.any_horizontal(_may_be_nested(*column) for column in schema.items())).to_series()
        if nested.any():  # tables and lists as text: polars has another spelling
            lines, places = block.split(b"\n"), nested.arg_true().to_list()
            again = _line_by_line(((first_row + at, lines[at]) for at in places), schema, path, skipped)
            frame = pl.concat([frame.filter(~nested), again]).sort(ROW)
        yield frame


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
    """
    Pairs of the first line's number (from 1) and the bytes of whole lines, without a byte order mark; the next block
    is read meanwhile. A file that is no text of one byte a character, or a line without end, is a [`UserError`].
    """
    first_row, rest = 1, b""
    with open_maybe_gzip(path) as file, ThreadPoolExecutor(1) as pool:
        reading, is_first = pool.submit(file.read, block_bytes), True
        packed, size = getattr(file, "fileobj", None) or file, os.path.getsize(path) >> 20
        while True:
            try:
                read = reading.result()
            except (OSError, EOFError, zlib.error) as error:
                row = first_row + rest.count(b"\n")
                raise UserError(
                    f"{path} is damaged after row {row - 1} ({' '.join(str(error).split())}): fetch the file again."
                ) from error
            if is_first:
                refuse_no_text(read, path)
                is_first, read = False, read.removeprefix(b"\xef\xbb\xbf")
            report(f"reading {os.path.basename(path)}, MiB", packed.tell() >> 20 if read else size, size)
            if read:
                reading = pool.submit(file.read, block_bytes)
            end = read.rfind(b"\n") + 1
            if len(rest) > LONGEST_LINE:
                raise UserError(
                    f"{path}, row {first_row} is a line of over {LONGEST_LINE >> 20} MiB: is this a file of lines?"
                )
            if read and not end:
                rest += read
                continue
            block, rest = rest + read[:end], read[end:]
            if block:
                yield first_row, block
            first_row += block.count(b"\n")
            if not read:
                return


def refuse_no_text(start: bytes, path: object) -> None:
    """Raise [`UserError`] that says what a file is which does not begin as UTF-8 text does."""
    for magic, fault in _NO_TEXT.items():
        if start.startswith(magic):
            raise UserError(f"{path} {fault}.")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} {_UNPACK.format('tar')}.")
    if start[:4].count(0) > 1:
        raise UserError(f"{path} is UTF-16 text or no text at all: save it as UTF-8.")


def _fast(block: bytes, schema: Schema) -> pl.DataFrame | None:
    """The block by polars' own parser, or None where it refuses a line or the lines cannot be numbered."""
    if _LONE_SURROGATE.search(block):  # which polars makes a NUL of
        return None
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        frame = pl.read_ndjson(io.BytesIO(block), schema=schema)
    except pl.exceptions.PolarsError:
        return None
    return frame if frame.height == lines else None


def _may_be_nested(name: str, kind: pl.DataType) -> pl.Expr:
    """Whether a text begins as a JSON table or list does, which it may have been."""
    if kind == pl.String:
        return pl.col(name).str.contains(r"^[\[{]").fill_null(False)
    return pl.col(name).list.eval(pl.element().str.contains(r"^[\[{]")).list.any().fill_null(False)


def _line_by_line(
    lines: Iterable[tuple[int, bytes]], schema: Schema, path: str | os.PathLike[str], skipped: Counter[str] | None
) -> pl.DataFrame:
    """The same by Python's parser, which says which line is wrong: the plain twin of [`_fast`]."""
    columns: dict[str, list] = {name: [] for name in schema}
    numbers = []
    for row, line in lines:
        if not line.strip():
            continue
        found = parsed(line, lambda value: _as_schema(value, schema), row, path, skipped)
        if found is not None:
            for name, value in found.items():
                columns[name].append(value)
            numbers.append(row)
    return pl.DataFrame({**columns, ROW: numbers}, schema={**schema, ROW: pl.Int64})


def parsed(
    line: bytes, make: Any, row: int, path: str | os.PathLike[str], skipped: Counter[str] | None
) -> dict[str, Any] | None:
    """`make` of the JSON object of a line; what cannot be read is counted in `skipped` (then None) or raised."""
    try:
        return make(parse_object(line))
    except (ValueError, RecursionError) as error:
        fault = "the JSON is nested too deeply" if isinstance(error, RecursionError) else error
        if skipped is None:
            raise UserError(
                f"{path}, row {row}: {fault}; mend the line, or pass --skip_bad_rows to leave such rows out and count "
                "them."
            ) from error
        skipped[UNREADABLE] += 1
        return None


def read_objects(path: str | os.PathLike[str], names: Mapping[str, str], skipped: Counter[str] | None) -> pl.DataFrame:
    """
    All columns that any line has, as text: read line by line, as no key may be lost.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        names (`Mapping[str, str]`):
            From key to column, for keys that get another name; a key that has such a name itself is left out.
        skipped (`Counter`, *optional*):
            Where lines that are no JSON objects are counted; None to raise at the first.

    Returns:
        `polars.DataFrame`: text columns, those of `names` first, and the line number in [`ROW`].
    """
    taken = {ROW, *names.values()}
    rows: list[dict[str, Any]] = []
    columns: dict[str, None] = dict.fromkeys(names.values())

    def flat(value: dict[str, Any]) -> dict[str, str | None]:
        kept = {names.get(key, key): part for key, part in value.items() if key in names or key not in taken}
        return {as_text(name) or UNNAMED: flat_text(part) for name, part in kept.items()}

    for first, block in blocks(path):
        for number, line in enumerate(block.split(b"\n"), start=first):
            if line.strip() and (row := parsed(line, flat, number, path, skipped)) is not None:
                columns.update(dict.fromkeys(row))
                rows.append({**row, ROW: number})
                if len(columns) > MOST_KEYS:
                    raise UserError(
                        f"{path}, row {number}: over {MOST_KEYS:,} different keys; give all rows the same."
                    )
    if not rows:
        raise UserError(f"{path} is empty: a catalogue needs at least one item.")
    return pl.DataFrame(rows, schema={**dict.fromkeys(columns, pl.String), ROW: pl.Int64})


def listing(names: Iterable[str], most: int = 30) -> str:
    """Names from a file for a sentence: in one line, and not without end."""
    shown = [" ".join(name.split())[:60] for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object, or a ValueError that fits into a sentence; of a repeated key the first value (as polars)."""
    limit = sys.getrecursionlimit()
    try:
        text = line.decode()
        try:
            value = json.loads(text, object_pairs_hook=_first_of_each)
        except RecursionError:  # polars reads a thousand levels: so must this
            sys.setrecursionlimit(limit + 3000)
            value = json.loads(text, object_pairs_hook=_first_of_each)
    except ValueError as error:
        if line.strip() in (b"[", b"{"):
            raise ValueError("not a JSON object but a line of one: write each on a line of its own") from error
        raise ValueError(f"not a JSON object ({' '.join(str(error).split())})") from error
    finally:
        sys.setrecursionlimit(limit)
    if not isinstance(value, dict):
        hint = ": write each of its objects on a line of its own" if isinstance(value, list) else ""
        raise ValueError(f"not a JSON object (a {type(value).__name__}{hint})")
    return value


def first_keys(path: str | os.PathLike[str]) -> list[str]:
    """The keys of the first line that can be read."""
    for _, block in blocks(path):
        for line in filter(bytes.strip, block.split(b"\n")):
            with contextlib.suppress(ValueError, RecursionError):
                return list(parse_object(line))
    return []


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len(pairs) < 2 else {**dict(pairs), **dict(reversed(pairs))}


def as_text(value: Any) -> str | None:
    """
    Any JSON value as text, as polars would give it: numbers in plain digits (`1.0` is `1`), tables and lists as JSON;
    null, NaN and infinity are missing.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4000:
        raise ValueError("a number has over a thousand digits")
    text = value if isinstance(value, str) else json.dumps(finite(value), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is not text


def flat_text(value: Any) -> str | None:
    """The same with the parts of a list joined by blanks."""
    if isinstance(value, list):
        return " ".join(text for part in value if (text := flat_text(part)))
    return as_text(value)


def _as_schema(value: dict[str, Any], schema: Schema) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, kind in schema.items():
        found = value.get(name)
        if kind == pl.String or found is None:
            row[name] = as_text(found)
        elif isinstance(found, list):
            row[name] = [as_text(part) for part in found]
        elif isinstance(found, str):
            row[name] = [as_text(found)] if found else []
        elif isinstance(found, float) and math.isnan(found):
            row[name] = None
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
