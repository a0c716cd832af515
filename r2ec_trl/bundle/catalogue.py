"""Rows to add to or change in a catalogue, brought to its columns and types."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import polars as pl
import pyarrow as pa
from datasets import Dataset

from r2ec_trl.errors import UserError

Rows: TypeAlias = "Dataset | pl.DataFrame | Iterable[Mapping[str, Any]]"


def new_rows(items: Dataset, new_items: Rows) -> Dataset:
    """
    New rows with the catalogue's columns and types; what they leave out is null.

    Raises:
        [`UserError`]: for an id that is in the catalogue, or twice in the rows, a column that the catalogue has not, a
        value of another type, or a missing title.
    """
    records = _records(items, new_items)
    known = set(items["item_id"][:])
    for row in records:
        if row["item_id"] in known:
            raise UserError(f"Item {row['item_id']!r} is in the catalogue already; use `update_items` to change it.")
        if not _is_title(row.get("title")):
            raise UserError(f"Item {row['item_id']!r} has no title; every item needs one.")
    return _dataset(items, records)


def with_changes(items: Dataset, rows: Rows) -> tuple[Dataset, list[int]]:
    """
    The catalogue with columns of some items changed, and the numbers of those rows.

    Raises:
        [`UserError`]: for an id that is not in the catalogue, and as [`new_rows`] does.
    """
    changes = {row["item_id"]: row for row in _records(items, rows)}
    index = {item_id: row for row, item_id in enumerate(items["item_id"][:])}
    for item_id, row in changes.items():
        if item_id not in index:
            raise UserError(f"Item {item_id!r} is not in the catalogue; use `add_items` to add it.")
        if "title" in row and not _is_title(row["title"]):
            raise UserError(f"Item {item_id!r} would lose its title; every item needs one.")
    touched = sorted(index[item_id] for item_id in changes)
    records = [{**items[row], **changes[items[row]["item_id"]]} for row in touched]
    table = items.with_format("arrow")[:]
    fresh = _dataset(items, records).with_format("arrow")[:].cast(table.schema)
    order = list(range(len(items)))
    for position, number in enumerate(touched):
        order[number] = len(items) + position
    return Dataset(pa.concat_tables([table, fresh]).take(order)), touched


def _is_title(title: Any) -> bool:
    return isinstance(title, str) and bool(title.strip())


def _records(items: Dataset, rows: Rows) -> list[dict[str, Any]]:
    if isinstance(rows, Dataset):
        records = rows.to_list()
    elif isinstance(rows, pl.DataFrame):
        records = rows.to_dicts()
    else:
        records = _dicts(rows)
    if not records:
        raise UserError("There are no items among the rows; give one at least.")
    seen = set()
    for number, row in enumerate(records):
        item_id = row.get("item_id")
        if not isinstance(item_id, str) or not item_id:
            raise UserError(f"Row {number} has no `item_id` (a text); give every row one.")
        if item_id in seen:
            raise UserError(f"Item {item_id!r} is given twice; keep one row.")
        seen.add(item_id)
        for name in row:
            if name not in items.column_names:
                raise UserError(
                    f"Item {item_id!r}: the catalogue has no column {name!r}; it has {', '.join(items.column_names)}."
                )
    return records


def _dicts(rows: Any) -> list[dict[str, Any]]:
    found = None if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable) else list(rows)
    if found is None or not all(isinstance(row, Mapping) for row in found):
        raise UserError(
            f"The rows are {rows if found is None else found!r:.80}; give a list of objects with `item_id`."
        )
    return [dict(row) for row in found]


def _dataset(items: Dataset, records: list[dict[str, Any]]) -> Dataset:
    schema = items.with_format("arrow")[:0].schema.remove_metadata()
    columns = []
    for column in schema:
        try:
            values = [row.get(column.name) for row in records]
            columns.append(pa.array(values, type=column.type))
            if pa.types.is_integer(column.type) and columns[-1].to_pylist() != values:  # 1.5 becomes 1 in silence
                raise ValueError(f"{values!r:.80} are not all whole numbers")
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"Column {column.name!r} holds {column.type}: {str(error).splitlines()[0]}.") from error
    return Dataset(pa.Table.from_arrays(columns, schema=schema))
