"""The dataset that a recipe works on."""

import pytest

from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.data.schema import load_dataset_card
from r2ec_trl.errors import UserError


def test_no_name_is_one_sentence_and_a_folder_is_loaded(shop_folder, shop):
    with pytest.raises(UserError, match="add `--dataset FOLDER`"):
        load_dataset(None)
    dataset, card = load_dataset(str(shop_folder))
    assert dataset["test"]["user_id"][:] == shop["test"]["user_id"][:] and card == load_dataset_card(shop_folder)


def test_the_demo_is_generated_once(tmp_path, monkeypatch, shop):
    made = []
    card = {"source": "demo", "category": "part", "category_plural": "parts", "dropped": {}}
    card |= {"split_rule": "by user", "synthetic": True}
    monkeypatch.setattr("r2ec_trl.cli.dataset_choice.make_demo", lambda: made.append(1) or (shop, card))
    (one, _), (two, _) = load_dataset("demo", tmp_path), load_dataset("demo", tmp_path)
    assert made == [1] and (tmp_path / "demo_dataset").is_dir()
    assert one["train"]["user_id"][:] == two["train"]["user_id"][:] == shop["train"]["user_id"][:]
