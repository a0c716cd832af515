"""The dataset folder: what it holds, what it refuses, and that the same rows give the same bytes."""

import hashlib
import json
from functools import partial

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from r2ec_trl.data import schema
from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.schema import (
    CARD,
    ITEMS,
    SPLITS,
    load_dataset_card,
    load_dataset_folder,
    save_dataset_folder,
    validate_dataset,
)
from r2ec_trl.errors import UserError

CARD_VALUES = {
    "source": "by hand",
    "category": "video game",
    "category_plural": "video games",
    "dropped": {"no title": 2},
    "split_rule": "given",
    "synthetic": True,
}
ROW = {
    "user_id": ["u"],
    "history": [["a", "b"]],
    "target": ["c"],
    "history_ratings": [[5.0, 3.5]],
    "history_timestamps": [[10, 20]],
    "timestamp": [30],
}
ITEM_ROWS = {"item_id": ["a", "b", "c"], "title": ["Ant", "Bee", "Cat"], "brand": ["x", None, "z"]}


def small(**changes):
    """A dataset of one row a split; `changes` replace columns of train (or of items, for `item_id` and `title`)."""
    items = {**ITEM_ROWS, **{key: value for key, value in changes.items() if key in ITEM_ROWS}}
    train = {**ROW, **{key: value for key, value in changes.items() if key not in ITEM_ROWS}}
    train = {key: value for key, value in train.items() if value is not None}
    splits = {"train": train, "validation": ROW, "test": ROW, ITEMS: items}
    return DatasetDict({split: Dataset.from_dict(columns) for split, columns in splits.items()})


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_round_trip(tmp_path):
    save_dataset_folder(small(), tmp_path / "folder", CARD_VALUES)
    dataset = load_dataset_folder(tmp_path / "folder")
    assert list(dataset) == [*SPLITS, ITEMS]
    assert dataset["train"][0] == {key: value[0] for key, value in ROW.items()}
    assert dataset[ITEMS]["brand"][:] == ["x", None, "z"]
    card = load_dataset_card(tmp_path / "folder")
    assert card["counts"] == {"train": 1, "validation": 1, "test": 1, ITEMS: 3}
    assert card["dropped"] == {"no title": 2}
    assert card["sha256"]["train"] == card["sha256"]["test"] != card["sha256"][ITEMS]


def test_same_rows_give_the_same_bytes(tmp_path):
    save_dataset_folder(small(), tmp_path / "one", CARD_VALUES)
    save_dataset_folder(small().map(lambda row: row), tmp_path / "two", CARD_VALUES)
    save_dataset_folder(load_dataset_folder(tmp_path / "one"), tmp_path / "three", CARD_VALUES)
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    save_dataset_folder(small(), folder, CARD_VALUES)
    before = files(folder)
    with pytest.raises(UserError, match="exists already"):
        save_dataset_folder(small(), folder, CARD_VALUES)
    assert files(folder) == before

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_dataset_folder(small(), tmp_path / "other", CARD_VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"target": ["d"]}, r"split 'train', row 0 has a target that is not in the catalogue \('d'\)"),
        (
            {"history": [["a", "d"]]},
            r"split 'train', row 0: history names an item that is not in the catalogue \('d'\)",
        ),
        (
            {"history": [[]], "history_ratings": None, "history_timestamps": None},
            "column 'history' holds list<item: null>",
        ),
        ({"history": [["a", None]]}, "row 0: history holds a null"),
        ({"history": [["a"]]}, "row 0 has another number of history_ratings than of history items"),
        ({"history_timestamps": [[1]]}, "another number of history_timestamps"),
        ({"user_id": [7]}, "column 'user_id' holds int64, but must be a text"),
        ({"user_id": None}, "split 'train' has no column 'user_id'"),
        ({"target": None}, "split 'train' has no column 'target'"),
        ({"timestamp": [1.5]}, "column 'timestamp' holds double, but must be a whole seconds"),
        ({"item_id": ["a", "b", "a"]}, "lists item 'a' 2 times"),
        ({"item_id": ["a", "", "c"]}, "row 1 has an empty item_id"),
        ({"title": ["A", None, "C"]}, "row 1 has no title"),
        ({"title": ["A", " ", "C"]}, "row 1 has no title"),
    ],
)
def test_each_breach_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        validate_dataset(small(**changes), "here")
    assert "\n" not in str(caught.value)


def test_breaches_are_found_deep_in_a_split(monkeypatch):
    """In the third block that is looked at, and the second."""
    monkeypatch.setattr(schema, "arrow_batches", partial(schema.arrow_batches, rows=10_000))
    rows = 25_000
    history = [["a", "b"]] * rows
    history[20_001] = []
    train = {"user_id": ["u"] * rows, "history": history, "target": ["c"] * rows}
    dataset = small()
    dataset["train"] = Dataset.from_dict(train)
    with pytest.raises(UserError, match="row 20001 has an empty history"):
        validate_dataset(dataset, "here")
    history[20_001] = ["a"]
    history[15_000] = ["a", "nowhere"]
    dataset["train"] = Dataset.from_dict({**train, "history": history})
    with pytest.raises(UserError, match="row 15000: history names"):
        validate_dataset(dataset, "here")


def test_missing_or_empty_split():
    dataset = small()
    dataset["test"] = dataset["test"].select([])
    with pytest.raises(UserError, match="split 'test' is empty"):
        validate_dataset(dataset, "here")
    del dataset["test"]
    with pytest.raises(UserError, match="has no split 'test'"):
        validate_dataset(dataset, "here")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="There is no dataset folder"):
        load_dataset_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read as a dataset folder"):
        load_dataset_folder(tmp_path)
    small()["train"].save_to_disk(str(tmp_path / "single"))
    with pytest.raises(UserError, match="holds a single split"):
        load_dataset_folder(tmp_path / "single")
    with pytest.raises(UserError, match=f"has no {CARD}"):
        load_dataset_card(tmp_path / "single")
    (tmp_path / CARD).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset_card(tmp_path)
    (tmp_path / CARD).write_text("{}")
    with pytest.raises(UserError, match="lacks source, category"):
        load_dataset_card(tmp_path)


def test_a_damaged_folder_is_one_sentence(tmp_path):
    save_dataset_folder(small(), tmp_path / "folder", CARD_VALUES)
    for file in (tmp_path / "folder" / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read as a dataset folder"):
        load_dataset_folder(tmp_path / "folder")


def test_digest_sees_values_and_not_batches():
    table = pa.table(
        {"text": ["a", "bc", None, ""], "lists": [["a"], [], None, ["b", "c"]], "numbers": [1, None, 0, 4]}
    )
    cut = [table.slice(0, 1), table.slice(1, 2), table.slice(3)]
    large = table.cast(
        pa.schema({"text": pa.large_string(), "lists": pa.large_list(pa.large_string()), "numbers": pa.int64()})
    )
    expected = sha256_of([table])
    assert sha256_of(cut) == expected == sha256_of([large]) == sha256_of([table.select(["numbers", "lists", "text"])])
    for column, values in {
        "text": [["ab", "c", None, ""], ["a", "bc", "", ""], ["a", "bc", "", None]],
        "lists": [[[], ["a"], None, ["b", "c"]], [["a"], None, None, ["b", "c"]], [["a"], [], None, ["bc", ""]]],
        "numbers": [[1, 0, 0, 4], [1, 0, None, 4]],
    }.items():
        for other in values:
            index = table.column_names.index(column)
            changed = table.set_column(index, column, pa.array(other, type=table.schema.field(column).type))
            assert sha256_of([changed]) != expected, (column, other)


def test_digest_by_hand():
    """One text column "t" with the row "é": length 2 as eight little-endian bytes, then its two UTF-8 bytes."""
    lengths = hashlib.sha256((2).to_bytes(8, "little")).hexdigest()
    text = hashlib.sha256("é".encode()).hexdigest()
    assert sha256_of([pa.table({"t": ["é"]})]) == hashlib.sha256(f"t\0string\0{lengths}/{text}\n".encode()).hexdigest()
