"""Read delimited text (CSV, TSV, `::`) and parquet as named columns; damage located by file and row."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from r2ec_trl.data.sources.jsonl import ROW, UNNAMED, UNREADABLE, blocks, first_keys, flat_text, listing, read_jsonl
from r2ec_trl.errors import UserError, first_line

logger = logging.getLogger(__name__)

_PARQUET_ROWS = 1_000_000
_QUOTED_ROWS = 50_000
_LONGEST_FIELD = 1 << 20  # characters of a quoted field: a longer one is a quote that never ends
# Arrow types that a column of a table may have; decimals and nested types become text.
_TESTS = "null boolean integer floating string large_string string_view date timestamp"
_TYPES = tuple(getattr(pa.types, f"is_{name}") for name in _TESTS.split())
_ONE_VALUE = set("user_id item_id parent_asin title rating timestamp split".split())  # never lists, never tables


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
    if dialect is None and is_json(path):
        schema = {source: pl.String for source in columns.values()}
        frames = read_jsonl(path, schema, skip_bad_rows=skipped is not None, dropped=skipped)
        return _without_absent(frames, columns, optional, path)
    if dialect is None and _ending(path, ".parquet", ".pq"):
        return _read_parquet(path, columns, optional)
    if dialect is None:
        dialect = _told_by_name(path)
    return _read_delimited(path, columns, dialect, optional, skipped)


def is_json(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it holds JSON lines, packed or not."""
    return _ending(path, ".jsonl", ".ndjson", ".json")


def _ending(path: str | os.PathLike[str], *endings: str) -> bool:
    return Path(path).name.lower().removesuffix(".gz").endswith(endings)


def _told_by_name(path: str | os.PathLike[str]) -> Dialect:
    return Dialect(separator="\t" if _ending(path, ".tsv", ".tab") else ",")


def column_names(path: str | os.PathLike[str], dialect: Dialect | None = None) -> list[str]:
    """The columns a delimited or parquet file has."""
    if dialect is None and Path(path).name.lower().endswith((".parquet", ".pq")):
        with open_parquet(path) as file:
            return list(named_columns(file.schema_arrow.names, path))
    dialect = dialect or _told_by_name(path)
    first = next(blocks(path, 1 << 16), (1, b""))[1]
    return _header(first.partition(b"\n")[0], dialect, path)


def _chosen(
    columns: Mapping[str, str], found: Sequence[str], optional: Sequence[str], path: str | os.PathLike[str]
) -> dict[str, str]:
    for name, source in columns.items():
        if source not in found and name not in optional:
            raise no_column(path, f"'{source}' (for {name})", found)
    return {name: source for name, source in columns.items() if source in found}


def no_column(path: str | os.PathLike[str], what: str, found: Iterable[str]) -> UserError:
    """The sentence for a column that a file lacks; one column alone may be all of them, with another separator."""
    found = list(found)
    other = next((sign for sign in ";\t|," if len(found) == 1 and sign in found[0]), None)
    hint = f": its fields stand between {other!r}, so save it with another separator or name" if other else ""
    return UserError(f"{path} has no column {what}; it has {listing(found)}{hint}.")


def _without_absent(
    frames: Iterator[pl.DataFrame], columns: Mapping[str, str], optional: Sequence[str], path: str | os.PathLike[str]
) -> Iterator[pl.DataFrame]:
    """JSON lines have no header: a key that the first block never has is a column the file lacks."""
    chosen: dict[str, str] | None = None
    for frame in frames:
        filled = [name for name in frame.columns if name != ROW and frame[name].null_count() < frame.height]
        if chosen is None:
            absent = [name for name, source in columns.items() if name not in optional and source not in filled]
            there = first_keys(path) if absent and frame.height else filled  # so that the sentence names what is there
            chosen = _chosen(columns, there, optional, path) if frame.height else dict(columns)
        late = [name for name in filled if name not in chosen.values()]
        if late:
            row = frame.filter(pl.col(late[0]).is_not_null())[ROW][0]
            raise UserError(f"{path}, row {row} is the first to have '{late[0]}': give every row the same keys.")
        yield frame.select(ROW, **{name: pl.col(source) for name, source in chosen.items()})


def open_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """A parquet file, or a [`UserError`] that says why it is none."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}): check the path.") from error


def _read_parquet(
    path: str | os.PathLike[str], columns: Mapping[str, str], optional: Sequence[str]
) -> Iterator[pl.DataFrame]:
    """In batches, by Arrow: polars' own reader ends the program where a file is damaged."""
    row = 1
    with open_parquet(path) as file:
        names = named_columns(file.schema_arrow.names, path)
        chosen = {name: names[source] for name, source in _chosen(columns, list(names), optional, path).items()}
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(chosen.values())):
                batch.validate(full=True)  # text that is not UTF-8 would be undefined behaviour in polars
                frame = pl.DataFrame({name: _plain(batch.column(at), name, at, path) for name, at in chosen.items()})
                yield frame.select(pl.int_range(row, row + pl.len(), dtype=pl.Int64).alias(ROW), pl.all())
                row += frame.height
        except UserError:
            raise
        except (pa.ArrowException, OSError, ValueError, pl.exceptions.PolarsError) as error:
            fault = f"is damaged after row {row - 1} ({first_line(error)}): write it again"
            raise UserError(f"{path} {fault}.") from error


def _plain(values: pa.Array, name: str, source: str, path: str | os.PathLike[str]) -> pl.Series:
    """
    A column as text, numbers, dates or lists of text. Times lose their zone: seconds are counted from the same moment,
    and a damaged name would end the program. Tables and lists of lists become text, NaN is missing.
    """
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    kind = values.type
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        values = values.cast(pa.timestamp(kind.unit))
    elif pa.types.is_float16(kind):
        values = values.cast(pa.float32())
    elif pa.types.is_decimal(kind):
        values = values.cast(pa.string())
    elif pa.types.is_nested(kind) and name not in _ONE_VALUE:
        inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
            try:
                return pl.Series(source, [flat_text(value) for value in values.to_pylist()], pl.String)
            except (TypeError, ValueError) as error:  # bytes, dates and the like inside
                raise _wrong_type(source, kind, path) from error
    elif not any(test(kind) for test in _TYPES):
        raise _wrong_type(source, kind, path)
    column = pl.Series(values)
    return column.fill_nan(None) if column.dtype.is_float() else column


def _wrong_type(source: str, kind: pa.DataType, path: str | os.PathLike[str]) -> UserError:
    fault = f"column '{listing([source])}' holds {listing([str(kind)])}"
    return UserError(f"{path}: {fault}: write it as text or numbers, or leave the column out.")


def _read_delimited(
    path: str | os.PathLike[str],
    columns: Mapping[str, str],
    dialect: Dialect,
    optional: Sequence[str],
    skipped: Counter[str] | None,
) -> Iterator[pl.DataFrame]:
    names: list[str] | None = None
    row = 1
    source = (block for _, block in blocks(path))
    for block in source:
        if names is None:
            header, _, rest = block.partition(b"\n")
            names = _header(header, dialect, path)
            block = block if dialect.names else rest
            chosen = _chosen(columns, names, optional, path)
        if not block:
            continue
        if dialect.quoted and b'"' in block:  # line ends may be text from here on: the rest is one stream
            records = _quoted(itertools.chain([block], source), dialect, len(names), row, path)
            found = _frames(records, names, row, path, skipped)
        elif (frame := _fast(block, names, dialect)) is not None:
            found = iter([frame.with_columns(pl.int_range(row, row + frame.height, dtype=pl.Int64).alias(ROW))])
        else:
            found = _frames(_unquoted(block, dialect), names, row, path, skipped)
        for frame in found:
            yield frame.select(ROW, **{name: pl.col(column) for name, column in chosen.items()})
        row += block.count(b"\n")


def _fast(block: bytes, names: list[str], dialect: Dialect) -> pl.DataFrame | None:
    """A block without quotes by polars' own parser, or None where it refuses it or reads it unlike its plain twin."""
    if dialect.encoding != "utf-8" or len(dialect.separator) > 1:
        try:
            text = block.decode(dialect.encoding)
        except UnicodeDecodeError:
            return None
        if len(dialect.separator) > 1 and "\x1f" in text:
            return None
        block = text.replace(dialect.separator, "\x1f").encode() if len(dialect.separator) > 1 else text.encode()
    block, separator = block.replace(b"\r\n", b"\n"), dialect.separator if len(dialect.separator) == 1 else "\x1f"
    if b"\r" in block or b"\n\n" in block or block.startswith((b"\n", b"\xef\xbb\xbf")):
        return None
    if block[block.rfind(b"\n", 0, -1) + 1 :].count(separator.encode()) >= len(names):
        return None  # polars takes one empty field too many at the end
    try:
        frame = pl.read_csv(
            io.BytesIO(block),
            has_header=False,
            separator=separator,
            quote_char=None,
            infer_schema=False,
            schema={name: pl.String for name in names},
        )
    except pl.exceptions.PolarsError:
        return None
    return frame if frame.height == block.count(b"\n") + (not block.endswith(b"\n")) else None


def _unquoted(block: bytes, dialect: Dialect) -> Iterator[list[str] | str]:
    """The fields of each line, or what is wrong with it: the plain twin of [`_fast`]."""
    for line in block.removesuffix(b"\n").split(b"\n"):
        try:
            text = line.decode(dialect.encoding).rstrip("\r")
        except UnicodeDecodeError as error:
            yield f"not {dialect.encoding} text ({error.reason})"
            continue
        if "\r" in text:
            yield "a carriage return inside a line"
        else:
            yield text.split(dialect.separator) if text else []


class _Lines:
    """Lines of text; those of a record that turns out to be none can be given back, all but its first."""

    def __init__(self, source: Iterable[bytes], encoding: str):
        self.source = (line for block in source for line in io.BytesIO(block))
        self.encoding = encoding
        self.taken: list[bytes] = []
        self.returned: list[bytes] = []
        self.fault = ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.returned.pop() if self.returned else next(self.source)
        self.taken.append(line)
        try:
            return line.decode(self.encoding)
        except UnicodeDecodeError as error:
            self.fault = f"not {self.encoding} text ({error.reason})"
            return line.decode(self.encoding, "replace")

    def begin_record(self) -> None:
        self.taken, self.fault = [], ""

    def give_back(self) -> None:
        self.returned += reversed(self.taken[1:])


def _quoted(
    source: Iterable[bytes], dialect: Dialect, width: int, row: int, path: str | os.PathLike[str]
) -> Iterator[list[str] | str]:
    """The same where fields may stand in quotes, by Python's parser; a broken record is its first line alone."""
    csv.field_size_limit(_LONGEST_FIELD)
    lines, separator = _Lines(source, dialect.encoding), dialect.separator.encode()
    reader = csv.reader(lines, delimiter=dialect.separator, strict=True)
    for row in itertools.count(row):
        lines.begin_record()
        try:
            fields = next(reader)
            fault = lines.fault or _too_many(fields, width)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = "limit" in str(error) or "end of data" in str(error)
            fault = f"not a record of quoted fields ({'a quote that does not end' if is_open else error})"
        taken = lines.taken
        if fault:
            lines.give_back()
        elif len(taken) > 1 and all(line.count(separator) == width - 1 for line in taken):
            logger.warning("%s, row %d: %d lines that all look like rows; check its quotes.", path, row, len(taken))
        yield fault or fields


def _frames(
    records: Iterator[list[str] | str],
    names: list[str],
    row: int,
    path: str | os.PathLike[str],
    skipped: Counter[str] | None,
) -> Iterator[pl.DataFrame]:
    """Records as frames with the row number of each; an empty record is none, a wrong one is counted or raised."""
    schema = {**{name: pl.String for name in names}, ROW: pl.Int64}
    values: list[list[str | int | None]] = []
    for number, fields in enumerate(records, start=row):
        fault = fields if isinstance(fields, str) else ""
        fault = fault or _too_many(fields, len(names))
        if fault and skipped is None:
            cure = "mend the row, or pass --skip_bad_rows to leave such rows out and count them"
            raise UserError(f"{path}, row {number}: {fault}; {cure}.")
        if fault:
            skipped[UNREADABLE] += 1  # type: ignore[index]
        elif fields:
            values.append([*(value or None for value in fields), *[None] * (len(names) - len(fields)), number])
        if len(values) == _QUOTED_ROWS:
            yield pl.DataFrame(values, schema=schema, orient="row")
            values = []
    yield pl.DataFrame(values, schema=schema, orient="row")


def _too_many(fields: Sequence[str], width: int) -> str:
    return f"{len(fields)} fields where the file has {width} columns" if len(fields) > width else ""


def _header(line: bytes, dialect: Dialect, path: str | os.PathLike[str]) -> list[str]:
    if dialect.names:
        return list(dialect.names)
    quoted = dialect.quoted and b'"' in line
    fields = next(_quoted([line], dialect, len(line), 0, path) if quoted else _unquoted(line, dialect), [])
    if isinstance(fields, str):
        raise UserError(f"{path}, header line: {fields}; save the file as UTF-8 with one line a row.")
    if not fields:
        raise UserError(f"{path} has no header line to name its columns: write one.")
    return list(named_columns(fields, path))


def named_columns(written: Sequence[str], path: str | os.PathLike[str]) -> dict[str, str]:
    """From a column's name, without blanks around it and never empty, to how the file writes it."""
    names = [name.strip() or f"{UNNAMED}{at}" for at, name in enumerate(written)]
    check_unique(names, path)
    return dict(zip(names, written))


def check_unique(names: Iterable[str], path: str | os.PathLike[str]) -> None:
    """Raise [`UserError`] if a file has two columns of one name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{path} names column '{listing(repeated[:1])}' twice: rename one.")


def is_index(name: str) -> bool:
    """Whether a column is what pandas leaves behind: an index without a name."""
    return name.startswith((UNNAMED, "Unnamed: ", "__index_level_"))
