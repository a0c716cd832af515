"""Prompt lengths of a dataset: counted on whole prompts, over the limit counted too."""

import pytest

from r2ec_trl.data import prompt_lengths as old_name
from r2ec_trl.errors import UserError
from r2ec_trl.policy.prompt_lengths import prompt_lengths
from r2ec_trl.policy.prompts import PromptConfig, Prompts


def test_counts_are_those_of_the_prompts(shop, chat_tokenizer, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = prompt_lengths(shop, str(tmp_path / "tokenizer"), "product", rows=5)
    prompts = Prompts(chat_tokenizer, PromptConfig(category="product", max_item_length=1 << 30), shop["items"])
    lengths = [len(prompts.item_ids(shop["items"][at])) for at in (0, 9, 19, 29, 39)]
    assert found["items"]["max"] == max(lengths) and sum(found["items"]["histogram"].values()) == 5
    assert found["items"]["over_limit"] == sum(n > PromptConfig().max_item_length for n in lengths) / 5
    assert found["tokenizer"] == "tokenizer" and old_name is prompt_lengths


def test_a_folder_that_is_no_tokenizer(shop, tmp_path):
    with pytest.raises(UserError, match="--tokenizer .* cannot be loaded"):
        prompt_lengths(shop, str(tmp_path), "product")
