"""The audit: figures by hand, and each kind of leakage found when it is put in."""

import json

import pytest
from datasets import Dataset, DatasetDict

from r2ec_trl.cli.audit_tables import audit_tables
from r2ec_trl.data import audit_dataset, check_folder, save_dataset_folder
from r2ec_trl.data.audit import LEAKS

ROWS = {
    "train": [("u", "ab", [1, 2], "c", 3), ("u", "abc", [1, 2, 3], "a", 4), ("v", "a", [5], "b", 6)],
    "validation": [("u", "abca", [1, 2, 3, 4], "d", 7), ("w", "b", [6], "b", 8)],
    "test": [("u", "abcad", [1, 2, 3, 4, 7], "a", 9), ("w", "bb", [6, 8], "e", 9), ("v", "ab", [5, 6], "b", 9)],
}


def dataset(rows=ROWS, times=True):
    splits = {}
    for split, part in rows.items():
        columns = {"user_id": [row[0] for row in part], "history": [list(row[1]) for row in part]}
        columns["target"] = [row[3] for row in part]
        if times:
            columns |= {"history_timestamps": [row[2] for row in part], "timestamp": [row[4] for row in part]}
        splits[split] = Dataset.from_dict(columns)
    items = {
        "item_id": list("abcdef"),
        "title": ["A", "B", "C", "D", "E", "E"],
        "brand": ["x", None, "y", "x", "z", "z"],
    }
    return DatasetDict(**splits, items=Dataset.from_dict(items))


def test_figures_by_hand():
    audit = audit_dataset(dataset(), "leave_one_out")
    assert audit["users"] == 3
    train, validation, test = (audit["splits"][split] for split in ("train", "validation", "test"))
    assert {key: train[key] for key in ("rows", "users", "cold_users", "repeat_targets", "targets")} == {
        "rows": 3,
        "users": 2,
        "cold_users": 0,
        "repeat_targets": 1,
        "targets": 3,
    }
    assert (validation["cold_users"], validation["rows_of_cold_users"]) == (1, 1)
    assert (test["cold_users"], test["rows_of_cold_users"]) == (1, 1)
    assert validation["rows_with_unseen_target"] == 1  # d
    assert test["rows_with_unseen_target"] == 1  # e
    assert test["repeat_targets"] == 2 and test["hit_cap_under_mask"] == pytest.approx(1 / 3)
    assert train["history_length"] == {"mean": 2.0, "median": 2.0, "max": 3, "histogram": {"1": 1, "2": 1, "3-4": 1}}
    assert test["history_length"]["histogram"] == {"2": 2, "5-9": 1}
    assert train["target_tied_with_history"] == 0
    assert audit["catalogue"] == {
        "items": 6,
        "never_in_train": 3,
        "never_a_train_target": 3,
        "same_text_as_another": 2,
        "empty_fields": {"title": 0, "brand": 1},
        "mean_words": {"title": 1.0, "brand": 0.8},
    }
    assert audit["leakage"] == {
        "history_after_target": 0,
        "history_out_of_order": 0,
        "row_in_two_splits": 0,
        "train_after_held_out": 0,
    }
    assert audit["notes"]["train_targets_later_than_the_first_test_target"] == 0
    assert audit["notes"]["test_rows_whose_last_step_is_a_train_row_of_the_user"] == 0


def leaky(split, position, row):
    rows = {name: list(part) for name, part in ROWS.items()}
    rows[split][position : position + 1] = row
    return rows


@pytest.mark.parametrize(
    "cause, rule, rows",
    [
        ("history_after_target", "given", leaky("test", 2, [("v", "ab", [5, 10], "b", 9)])),
        ("history_out_of_order", "given", leaky("test", 2, [("v", "ab", [6, 5], "b", 9)])),
        ("row_in_two_splits", "given", leaky("test", 2, [("u", "abca", [1, 2, 3, 4], "d", 7)])),
        ("train_after_held_out", "given", leaky("train", 1, [("u", "abcad", [1, 2, 3, 4, 7], "c", 8)])),
        ("train_after_held_out", "given", leaky("train", 2, [("v", "a", [5], "b", 10)])),  # v is in test alone
        ("splits_overlap_in_time", "time_ratio", leaky("train", 2, [("v", "a", [5], "b", 8)])),
        ("splits_overlap_in_time", "time_ratio", leaky("validation", 1, [("w", "b", [6], "b", 10)])),
    ],
)
def test_each_leak_is_found(tmp_path, cause, rule, rows):
    audit = audit_dataset(dataset(rows), rule)
    assert [name for name, count in audit["leakage"].items() if count] == [cause]
    card = {
        "source": "x",
        "category": "x",
        "category_plural": "x",
        "dropped": {},
        "split_rule": rule,
        "synthetic": True,
    }
    save_dataset_folder(dataset(rows), tmp_path / "folder", card)
    assert check_folder(tmp_path / "folder")[1] == [f"1 {LEAKS[cause]}"]
    assert len(list(audit_tables(audit, card))) == 3


def test_without_times_the_history_tells_rows_apart():
    rows = leaky("test", 2, [("u", "abca", [1, 2, 3, 4], "d", 7)])
    assert audit_dataset(dataset(rows, times=False))["leakage"] == {"row_in_two_splits": 1}
    rows = leaky("test", 2, [("u", "baca", [1, 2, 3, 4], "d", 7)])  # the same items in another order
    audit = audit_dataset(dataset(rows, times=False))
    assert audit["leakage"] == {"row_in_two_splits": 0}
    rows = leaky("test", 2, [("v", "a", [], "b", 0), ("v", "da", [], "b", 0)])
    notes = audit_dataset(dataset(rows, times=False))["notes"]
    assert notes == {"test_rows_whose_last_step_is_a_train_row_of_the_user": 2}


def test_changed_rows_are_found(tmp_path):
    card = {
        "source": "x",
        "category": "x",
        "category_plural": "x",
        "dropped": {},
        "split_rule": "given",
        "synthetic": True,
    }
    save_dataset_folder(dataset(), tmp_path / "folder", card)
    assert check_folder(tmp_path / "folder")[1] == []
    file = tmp_path / "folder" / "dataset_card.json"
    stored = json.loads(file.read_text())
    for split in ("test", "items"):
        changed = {**stored, "sha256": {**stored["sha256"], split: "0" * 64}}
        file.write_text(json.dumps(changed))
        sentence = f"the rows of '{split}' are not those of the card's SHA-256"
        assert check_folder(tmp_path / "folder")[1] == [sentence]


def test_times_in_one_split_alone():
    """Then rows are told apart by their histories, as where there are no times."""
    mixed = dataset(times=False)
    mixed["train"] = dataset()["train"]
    audit = audit_dataset(mixed, "given")
    assert (
        audit["leakage"]["row_in_two_splits"]
        == audit_dataset(dataset(times=False), "given")["leakage"]["row_in_two_splits"]
    )


def test_order_in_one_split_alone_is_looked_at():
    mixed = dataset(times=False)
    mixed["train"] = dataset(leaky("train", 0, [("u", "ab", [2, 1], "c", 3)]))["train"]
    assert audit_dataset(mixed, "given")["leakage"]["history_out_of_order"] == 1
