"""A recommender to evaluate: the tiny Llama, short prompts, its encoded table."""

import pytest
import torch

from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.prompts import PromptConfig, Prompts


@pytest.fixture
def recommender(tiny_model, chat_tokenizer, shop):
    """A model, its prompts and its encoded table."""
    model = tiny_model("llama")
    add_answer_state(model)
    short = PromptConfig(user_template="{history}", item_template="{fields}", item_fields=("title",))
    prompts = Prompts(chat_tokenizer, short, shop["items"])
    table = make_table(prompts, shop["items"], "cosine", "cpu")
    with torch.no_grad():
        table.refresh(make_encoder(model, prompts, 16_384))
    return model, prompts, table
