"""Read delimited text (CSV, TSV, `::`) and parquet as named columns; damage located by file and row."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from r2ec_trl.data.sources.jsonl import BLOCK_BYTES, ROW, UNREADABLE, blocks, listing, read_jsonl
from r2ec_trl.errors import UserError

_PARQUET_ROWS = 1_000_000


@dataclass(frozen=True)
class Dialect:
    """
    How a delimited file is written.

    Args:
        separator (`str`, *optional*, defaults to `","`):
            Between fields; `"::"` and the like are allowed.
        quoted (`bool`, *optional*, defaults to `True`):
            Whether fields may stand in double quotes (and then hold separators and line ends).
        names (`Sequence[str]`, *optional*):
            Column names of a file without a header line.
        encoding (`str`, *optional*, defaults to `"utf-8"`):
            Of the text.
    """

    separator: str = ","
    quoted: bool = True
    names: Sequence[str] | None = None
    encoding: str = "utf-8"


def read_table(
    path: str | os.PathLike[str],
    columns: Mapping[str, str],
    *,
    dialect: Dialect | None = None,
    optional: Sequence[str] = (),
    skipped: Counter[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """
    Frames of chosen columns of any table file, told by its name: `.csv`, `.tsv`, `.jsonl` (each also `.gz`) or
    `.parquet`.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        columns (`Mapping[str, str]`):
            From the name in the result to the name in the file.
        dialect ([`Dialect`], *optional*):
            For delimited text; by default told by the name.
        optional (`Sequence[str]`, *optional*):
            Names (in the result) of columns that the file need not have.
        skipped (`Counter`, *optional*):
            Where unreadable rows are counted; None to raise at the first.

    Returns:
        Iterator of `polars.DataFrame`: the columns, and the row number (data rows from 1) in [`ROW`].
    """
    name = Path(path).name.lower().removesuffix(".gz")
    if dialect is None and name.endswith((".jsonl", ".ndjson", ".json")):
        schema = {source: pl.String for source in columns.values()}
        frames = read_jsonl(path, schema, skip_bad_rows=skipped is not None, dropped=skipped)
        return _without_absent(frames, columns, optional, path)
    if dialect is None and name.endswith((".parquet", ".pq")):
        return _read_parquet(path, columns, optional)
    if dialect is None:
        dialect = Dialect(separator="\t" if name.endswith((".tsv", ".tab")) else ",")
    return _read_delimited(path, columns, dialect, optional, skipped)


def column_names(path: str | os.PathLike[str], dialect: Dialect | None = None) -> list[str]:
    """The columns a delimited or parquet file has."""
    if dialect is None and Path(path).name.lower().endswith((".parquet", ".pq")):
        with _open_parquet(path) as file:
            return list(file.schema_arrow.names)
    dialect = dialect or Dialect(separator="\t" if ".tsv" in Path(path).name.lower() else ",")
    first = next(blocks(path, 1 << 16), (1, b""))[1]
    return _header(first.split(b"\n", 1)[0], dialect, path)


def _chosen(
    columns: Mapping[str, str], found: Sequence[str], optional: Sequence[str], path: str | os.PathLike[str]
) -> dict[str, str]:
    for name, source in columns.items():
        if source not in found and name not in optional:
            raise UserError(f"{path} has no column '{source}' (for {name}); it has {listing(found)}.")
    return {name: source for name, source in columns.items() if source in found}


def _without_absent(
    frames: Iterator[pl.DataFrame], columns: Mapping[str, str], optional: Sequence[str], path: str | os.PathLike[str]
) -> Iterator[pl.DataFrame]:
    """JSON lines have no header: a key that the first block never has is a column the file lacks."""
    chosen: dict[str, str] | None = None
    for frame in frames:
        if chosen is None:
            found = [name for name in frame.columns if name != ROW and frame[name].null_count() < frame.height]
            chosen = _chosen(columns, found, optional, path) if frame.height else dict(columns)
        yield frame.select(ROW, **{name: pl.col(source) for name, source in chosen.items()})


def _open_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet ({_first_line(error)}).") from error


def _read_parquet(
    path: str | os.PathLike[str], columns: Mapping[str, str], optional: Sequence[str]
) -> Iterator[pl.DataFrame]:
    """In batches, by Arrow: polars' own reader ends the program where a file is damaged."""
    row = 1
    with _open_parquet(path) as file:
        chosen = _chosen(columns, file.schema_arrow.names, optional, path)
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(chosen.values())):
                batch.validate(full=True)  # text that is not UTF-8 would be undefined behaviour in polars
                frame = pl.DataFrame({name: _plain(batch.column(at)) for name, at in chosen.items()})
                yield frame.select(pl.int_range(row, row + pl.len(), dtype=pl.Int64).alias(ROW), pl.all())
                row += frame.height
        except (pa.ArrowException, OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{path} is damaged after row {row - 1} ({_first_line(error)}).") from error


def _plain(values: pa.Array) -> pl.Series:
    """Without a time zone: seconds are counted from the same moment, and a damaged name would end the program."""
    zoned = pa.types.is_timestamp(values.type) and values.type.tz is not None
    return pl.Series(values.cast(pa.timestamp(values.type.unit)) if zoned else values)


def _read_delimited(
    path: str | os.PathLike[str],
    columns: Mapping[str, str],
    dialect: Dialect,
    optional: Sequence[str],
    skipped: Counter[str] | None,
) -> Iterator[pl.DataFrame]:
    names: list[str] | None = None
    row = 1
    for block in _whole_records(path, dialect):
        if names is None:
            header, rest = block.split(b"\n", 1) if b"\n" in block else (block, b"")
            names = _header(header, dialect, path)
            block = block if dialect.names else rest
            chosen = _chosen(columns, names, optional, path)
        if not block:
            continue
        frame = _fast(block, names, dialect)
        if frame is None:
            frame, records = _record_by_record(block, names, dialect, row, path, skipped)
        else:
            frame, records = frame.with_columns(pl.int_range(row, row + frame.height).alias(ROW)), frame.height
        row += records
        yield frame.select(ROW, **{name: pl.col(source) for name, source in chosen.items()})


def _whole_records(path: str | os.PathLike[str], dialect: Dialect) -> Iterator[bytes]:
    """Blocks that end with a record. Once a quote appears, line ends may be text: the rest comes as one block."""
    rest: list[bytes] = []
    for _, block in blocks(path, BLOCK_BYTES):
        if rest or (dialect.quoted and b'"' in block):
            rest.append(block)
        else:
            yield block
    if rest:
        yield b"".join(rest)


def _fast(block: bytes, names: list[str], dialect: Dialect) -> pl.DataFrame | None:
    """The block by polars' own parser, or None where it refuses it or the rows cannot be numbered."""
    if dialect.encoding != "utf-8" or len(dialect.separator) > 1:
        try:
            text = block.decode(dialect.encoding)
        except UnicodeDecodeError:
            return None
        if len(dialect.separator) > 1 and "\x1f" in text:
            return None
        block = text.replace(dialect.separator, "\x1f").encode() if len(dialect.separator) > 1 else text.encode()
    block = block.rstrip(b"\r\n")
    if not block or block[0] in b"\r\n" or b"\n\n" in block or b"\n\r\n" in block:
        return None  # blank lines: polars makes rows of them
    try:
        frame = pl.read_csv(
            io.BytesIO(block),
            has_header=False,
            separator=dialect.separator if len(dialect.separator) == 1 else "\x1f",
            quote_char='"' if dialect.quoted else None,
            infer_schema=False,
            schema={name: pl.String for name in names},
        )
    except pl.exceptions.PolarsError:
        return None
    lines = block.count(b"\n") + 1
    return frame if frame.height == lines or (dialect.quoted and b'"' in block and frame.height < lines) else None


def _record_by_record(
    block: bytes,
    names: list[str],
    dialect: Dialect,
    first_row: int,
    path: str | os.PathLike[str],
    skipped: Counter[str] | None,
) -> tuple[pl.DataFrame, int]:
    """The same by Python's parser, which says which row is wrong: only for blocks that polars refuses."""
    values: list[list[str | None]] = []
    numbers = []
    row = first_row - 1
    for fields in _records(block, dialect):
        row += 1
        if isinstance(fields, list) and not fields:
            continue
        fault = fields if isinstance(fields, str) else None
        if fault is None and len(fields) > len(names):
            fault = f"{len(fields)} fields where the file has {len(names)} columns"
        if fault is not None:
            if skipped is None:
                raise UserError(
                    f"{path}, row {row}: {fault}; mend the row, or pass --skip_bad_rows to leave such rows out and "
                    "count them."
                )
            skipped[UNREADABLE] += 1
            continue
        values.append([value or None for value in fields] + [None] * (len(names) - len(fields)))
        numbers.append(row)
    frame = pl.DataFrame(values, schema={name: pl.String for name in names}, orient="row")
    return frame.with_columns(pl.Series(ROW, numbers, dtype=pl.Int64)), row - first_row + 1


def _records(block: bytes, dialect: Dialect) -> Iterator[list[str] | str]:
    """The fields of each record, or what is wrong with it."""
    if not dialect.quoted or len(dialect.separator) > 1 or b'"' not in block:
        for line in block.split(b"\n"):
            try:
                text = line.decode(dialect.encoding).removesuffix("\r")
            except UnicodeDecodeError as error:
                yield f"not {dialect.encoding} text ({error.reason})"
                continue
            yield text.split(dialect.separator) if text else []
        return
    text = block.decode(dialect.encoding, "replace")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=dialect.separator, strict=True)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not a record of quoted fields ({error})"


def _header(line: bytes, dialect: Dialect, path: str | os.PathLike[str]) -> list[str]:
    if dialect.names:
        return list(dialect.names)
    fields = next(_records(line.removeprefix(b"\xef\xbb\xbf"), dialect), [])
    if not isinstance(fields, list) or not fields:
        raise UserError(f"{path} has no header line to name its columns.")
    repeated = [name for name, count in Counter(fields).items() if count > 1]
    if repeated:
        raise UserError(f"{path} names column '{listing(repeated[:1])}' twice in its header line: rename one.")
    return fields


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
