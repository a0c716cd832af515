"""The dataset folder: the one shape every source is brought to, and everything downstream reads.

A dataset folder is a [`~datasets.DatasetDict`] on disk with the splits `train`, `validation`, `test` (one row a
target) and `items` (one row an item), and a `dataset_card.json` beside them that says where the rows come from, what
was dropped and why. Ids are strings; a history is oldest first and never empty; every item named by a row is in the
catalogue.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.sources.jsonl import listing
from r2ec_trl.data.sources.source import TOO_LATE
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.files import build_folder, file_sha256, write_json
from r2ec_trl.progress import report

SPLITS = ("train", "validation", "test")
ITEMS = "items"
CARD = "dataset_card.json"
CARD_DIGEST = "card_sha256"
CARD_KEYS: dict[str, type] = {
    "source": str,
    "category": str,
    "category_plural": str,
    "dropped": dict,
    "split_rule": str,
    "synthetic": bool,
}
_MORE_CARD_KEYS = dict.fromkeys(("counts", "sha256", "files", "facts", "settings", "published", "audit"), dict)

_REQUIRED = {"user_id": "text", "history": "list of text", "target": "text"}
_OPTIONAL = {
    "history_ratings": "list of numbers",
    "history_timestamps": "list of whole seconds",
    "timestamp": "whole seconds",
}
_NO_TIME = "is no time in whole seconds"
BATCH_ROWS = 500_000  # looked at together
BLOCK_ROWS = 100_000  # of a record batch on disk


def load_dataset_folder(path: str | os.PathLike[str]) -> DatasetDict:
    """
    Load and validate a dataset folder. Nothing outside it is read, nothing is written into it, and files that its card
    knows the SHA-256 of are hashed before they are looked at.

    Args:
        path (`str` or `os.PathLike`):
            Folder written by [`save_dataset_folder`] (or by `recipes/prepare_data.py`).

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation`, `test` and `items`, memory-mapped.

    Raises:
        [`UserError`]: if the folder is not there, is damaged or of another kind, or breaks one of the rules above.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no dataset folder at '{path}': prepare one with recipes/prepare_data.py.")
    there = [split for split in (*SPLITS, ITEMS) if (folder / split).is_dir()]
    if not there and (folder / "state.json").is_file():
        raise UserError(f"'{path}' holds a single split; a dataset folder has {', '.join(SPLITS)} and {ITEMS}.")
    try:
        if not there:
            raise FileNotFoundError(f"it has no folder '{SPLITS[0]}'")
        _check_files(folder, load_dataset_card(path).get("files", {}) if (folder / CARD).exists() else {})
        dataset = DatasetDict({split: _open_split(folder, split) for split in there})
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise UserError(
            f"'{path}' cannot be read as a dataset folder ({first_line(error)}): prepare one with "
            "recipes/prepare_data.py."
        ) from error
    validate_dataset(dataset, str(path))
    return dataset


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        for name, digest in zip(digests, pool.map(lambda name: file_sha256(_inside(folder, name)), digests)):
            if digest != digests[name]:
                raise ValueError(f"{name} is damaged: its SHA-256 is not that of {CARD}")


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder, whatever names and links say: its real path, or an error if that is elsewhere."""
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"it names {name!r}, which is outside the folder")
    return real


def _open_split(folder: Path, split: str) -> Dataset:
    """As `datasets` does, but a table is validated in full before it is used, and no cache is put beside the data."""
    state = json.loads(_inside(folder, f"{split}/state.json").read_text(encoding="utf-8"))
    tables = []
    for entry in state["_data_files"]:
        with pa.memory_map(str(_inside(folder, os.path.join(split, entry["filename"])))) as file:
            tables.append(pa.ipc.open_stream(file).read_all())
        tables[-1].validate(full=True)
    name = str(state.get("_fingerprint"))
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    return Dataset(table, fingerprint=name if re.fullmatch("[0-9a-f]{8,64}", name) else split)


def load_dataset_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `dataset_card.json` of a dataset folder."""
    file = Path(path) / CARD
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' has no {CARD}: prepare the folder with recipes/prepare_data.py.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): prepare the folder again.") from error
    if not isinstance(card, dict):
        raise UserError(f"{file} holds a {type(card).__name__}, not a table of keys: prepare the folder again.")
    _check_card(card, str(file))
    for key, kind in (("sha256", str), ("counts", int)):
        if not all(isinstance(card.get(key, {}).get(split), kind) for split in (*SPLITS, ITEMS)):
            raise UserError(
                f"{file}: '{key}' does not hold all of {', '.join(SPLITS)}, {ITEMS}: prepare the folder again."
            )
    digest = card.get(CARD_DIGEST)
    if digest is not None and digest != _card_digest(card):
        raise UserError(
            f"{file} is damaged or was edited (its SHA-256 is another): prepare the folder again, or delete its line "
            f"'{CARD_DIGEST}' if the change is yours."
        )
    return card


def _card_digest(card: dict[str, Any]) -> str:
    """Of all but the digests of rows, which [`~r2ec_trl.data.audit.check_folder`] compares."""
    text = json.dumps({key: card[key] for key in card if key not in (CARD_DIGEST, "sha256")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_dataset_folder(dataset: DatasetDict, path: str | os.PathLike[str], card: dict[str, Any]) -> None:
    """
    Validate a dataset and write it as a dataset folder: all of it or nothing, an interrupted run leaves no folder. The
    same rows and card give the same bytes.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The four splits.
        path (`str` or `os.PathLike`):
            Folder to create. An existing one is never overwritten.
        card (`dict`):
            Must hold `source`, `category`, `category_plural`, `dropped`, `split_rule` and `synthetic`; `counts`,
            `sha256` (of the rows of each split), `files` (of each file) and the card's own are filled in here.
    """
    refuse_to_overwrite(path)
    with build_folder(path) as folder:
        write_dataset(dataset, folder, card, str(path))


def write_dataset(dataset: DatasetDict, folder: Path, card: dict[str, Any], name: str) -> None:
    """[`save_dataset_folder`] into an existing folder; `name` is what sentences call the dataset."""
    _check_card(card, "The dataset card")
    report("checking and writing rows", 0, rows := sum(map(len, dataset.values())))
    with ThreadPoolExecutor() as pool:  # checking, hashing and writing all leave the interpreter free
        checked = pool.submit(validate_dataset, dataset, name)
        there = [split for split in (*SPLITS, ITEMS) if split in dataset]
        hashed = {split: pool.submit(sha256_of, arrow_batches(dataset[split])) for split in there}
        written = pool.submit(_write_splits, dataset, folder)
        checked.result()
        written.result()
        digests = {split: future.result() for split, future in hashed.items()}
        _name_splits(folder, digests)
        files = sorted(str(file.relative_to(folder)) for split in there for file in (folder / split).iterdir())
        of_files = dict(zip(files, pool.map(lambda file: file_sha256(folder / file), files)))
    report("checking and writing rows", rows, rows)
    counts = {**card.get("counts", {}), **{split: len(dataset[split]) for split in there}}
    whole = {**card, "counts": counts, "sha256": digests, "files": of_files}
    write_json(folder / CARD, {**whole, CARD_DIGEST: _card_digest(json.loads(json.dumps(whole)))})


def refuse_to_overwrite(path: str | os.PathLike[str]) -> None:
    """Raise [`UserError`] if `path` exists already: long work should find that out before it starts."""
    if os.path.lexists(path):
        raise UserError(f"'{path}' exists already and is not overwritten: choose another folder or remove it first.")


def validate_dataset(dataset: DatasetDict, source: str) -> None:
    """
    Check every rule of the dataset folder; the first breach is a [`UserError`] that names split, row and value.

    Rows are named as they are indexed: `row 3` of split `train` is `dataset["train"][3]`.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            Dataset to check.
        source (`str`):
            Where it comes from, for the message.
    """
    for split in (*SPLITS, ITEMS):
        if split not in dataset:
            raise UserError(f"{source} has no split '{split}': a dataset needs {', '.join(SPLITS)} and {ITEMS}.")
        if len(dataset[split]) == 0:
            raise UserError(f"{source}: split '{split}' is empty, and each split needs at least one row.")
    catalogue = _checked_catalogue(dataset[ITEMS], f"{source}: split '{ITEMS}'")
    for split in SPLITS:
        _check_rows(dataset[split], catalogue, f"{source}: split '{split}'")


def arrow_batches(dataset: Dataset, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The rows of a split as Arrow tables, also when the split was selected or shuffled before."""
    return dataset.with_format("arrow").iter(batch_size=rows)


def _write_splits(dataset: DatasetDict, folder: Path) -> None:
    """
    What `save_to_disk` writes, without what changes from run to run (format, cache history).

    It is asked to write the splits without rows, and Arrow then writes the rows: `save_to_disk` itself spends most of
    its time between batches of a thousand rows.
    """
    frame = DatasetDict()
    for split in (*SPLITS, ITEMS):
        part = dataset[split].with_format(None).select([]).flatten_indices()
        part.info.download_checksums = None
        frame[split] = part
    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        frame.save_to_disk(str(folder), num_shards={split: 1 for split in frame})
    finally:
        if was_enabled:
            datasets.enable_progress_bars()
    for split in frame:
        state = json.loads((folder / split / "state.json").read_text(encoding="utf-8"))
        schema = frame[split].features.arrow_schema
        with pa.ipc.new_stream(str(folder / split / state["_data_files"][0]["filename"]), schema) as writer:
            for batch in arrow_batches(dataset[split], BLOCK_ROWS):
                writer.write_table(batch.combine_chunks().cast(schema))


def _name_splits(folder: Path, digests: dict[str, str]) -> None:
    """The fingerprint that `datasets` caches by: of the rows alone, so that it does not change from run to run."""
    for split, digest in digests.items():
        file = folder / split / "state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        state["_fingerprint"] = digest[:16]
        file.write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")


def _checked_catalogue(items: Dataset, where: str) -> pa.Array:
    for column in ("item_id", "title"):
        _check_column(items, column, "text", where)
        row = _first_row(items, column, pc.is_null)
        if row is None and column == "title":
            row = _first_row(items, column, lambda titles: pc.equal(pc.utf8_trim_whitespace(titles), ""))
        if row is not None:
            raise UserError(f"{where}, row {row} has no {column}: fill it in or leave the item out.")
    ids = pa.chunked_array(
        [batch.column("item_id").cast(pa.string()).combine_chunks() for batch in arrow_batches(items)]
    )
    row = _first_row(items, "item_id", lambda column: pc.equal(column, ""))
    if row is not None:
        raise UserError(f"{where}, row {row} has an empty item_id: give the item an id or leave it out.")
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = repeated[0].as_py()
        raise UserError(f"{where} lists item '{first['values']}' {first['counts']} times: item ids must be unique.")
    return ids.combine_chunks()


def _check_rows(rows: Dataset, catalogue: pa.Array, where: str) -> None:
    for column, kind in _REQUIRED.items():
        _check_column(rows, column, kind, where)
    optional = [column for column in _OPTIONAL if column in rows.column_names]
    for column in optional:
        _check_column(rows, column, _OPTIONAL[column], where)
    start = 0
    for table in arrow_batches(rows):
        for column in (*_REQUIRED, *optional):
            _raise_at(pc.is_null(table[column]), start, where, f"has no {column}")
        lengths = pc.list_value_length(table["history"])
        _raise_at(pc.equal(lengths, 0), start, where, "has an empty history; leave such rows out")
        for column in optional:
            if column.startswith("history_"):
                differs = pc.not_equal(pc.list_value_length(table[column]), lengths)
                _raise_at(differs, start, where, f"has another number of {column} than of history items")
                values = pc.list_flatten(table[column])
                _check_inner(table, column, pc.is_null(values), start, where, "holds a null")
                if column == "history_ratings":
                    _check_inner(table, column, pc.invert(pc.is_finite(values)), start, where, "holds no number")
                else:
                    _check_inner(table, column, _is_no_time(values), start, where, _NO_TIME)
            else:
                _raise_at(_is_no_time(table[column]), start, where, f"has a {column} that {_NO_TIME}", table[column])
        _check_inner(table, "history", pc.is_null(pc.list_flatten(table["history"])), start, where, "holds a null")
        unknown = pc.invert(pc.is_in(pc.list_flatten(table["history"]).cast(pa.string()), value_set=catalogue))
        _check_inner(table, "history", unknown, start, where, "names an item that is not in the catalogue")
        unknown = pc.invert(pc.is_in(table["target"].cast(pa.string()), value_set=catalogue))
        _raise_at(unknown, start, where, "has a target that is not in the catalogue", table["target"])
        start += len(table)


def _is_no_time(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.or_(pc.less(values, 0), pc.greater(values, TOO_LATE))


def _check_inner(table: pa.Table, column: str, mask: pa.ChunkedArray, start: int, where: str, fault: str) -> None:
    if pc.any(mask).as_py():
        position = pc.index(mask, True).as_py()
        row = start + pc.list_parent_indices(table[column].combine_chunks())[position].as_py()
        value = pc.list_flatten(table[column])[position].as_py()
        raise UserError(f"{where}, row {row}: {column} {fault} ({value!r}); mend the row or leave it out.")


def _raise_at(
    mask: pa.ChunkedArray, start: int, where: str, fault: str, values: pa.ChunkedArray | None = None
) -> None:
    if pc.any(mask).as_py():
        position = pc.index(mask, True).as_py()
        value = "" if values is None else f" ({values[position].as_py()!r})"
        raise UserError(f"{where}, row {start + position} {fault}{value}.")


def _first_row(rows: Dataset, column: str, test: Any) -> int | None:
    start = 0
    for batch in arrow_batches(rows):
        mask = test(batch[column])
        if pc.any(mask).as_py():
            return start + pc.index(mask, True).as_py()
        start += len(batch)
    return None


def _check_column(rows: Dataset, column: str, kind: str, where: str) -> None:
    if column not in rows.column_names:
        raise UserError(f"{where} has no column '{column}'; it has {listing(rows.column_names)}.")
    found = rows.features.arrow_schema.field(column).type
    if not _is_kind(found, kind):
        raise UserError(f"{where}: column '{column}' holds {found}, but must be a {kind}.")


def _is_kind(found: pa.DataType, kind: str) -> bool:
    if kind.startswith("list of"):
        if not (pa.types.is_list(found) or pa.types.is_large_list(found)):
            return False
        return _is_kind(found.value_type, kind.removeprefix("list of "))
    if kind == "text":
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if kind == "numbers":
        return pa.types.is_floating(found) or pa.types.is_integer(found)
    return pa.types.is_integer(found)


def _check_card(card: dict[str, Any], where: str) -> None:
    missing = [key for key in CARD_KEYS if key not in card]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: a dataset card has {', '.join(CARD_KEYS)}.")
    for key, kind in {**CARD_KEYS, **_MORE_CARD_KEYS}.items():
        if key in card and not isinstance(card[key], kind):
            raise UserError(f"{where}: '{key}' holds {card[key]!r:.60}, which is no {kind.__name__}: mend the card.")
