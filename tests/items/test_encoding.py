"""The table of a catalogue is the encoder's states of the item prompts, however the work is shared out."""

from types import SimpleNamespace

import pytest
import torch

from r2ec_trl.items.encoding import make_encoder, make_table, share_encoding
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.prompts import PromptConfig, Prompts


def test_rows_are_the_states_of_the_item_prompts(tiny_model, chat_tokenizer, shop):
    model = tiny_model("llama")
    add_answer_state(model)
    prompts = Prompts(chat_tokenizer, PromptConfig(item_fields=["title"]), shop["items"])
    table = make_table(prompts, shop["items"], "dot", "cpu")
    assert table.is_empty and table.item_ids == shop["items"]["item_id"][:]
    with torch.no_grad():
        table.refresh(make_encoder(model, prompts, 500))
        alone = make_encoder(model, prompts, 500)([prompts.item_ids(shop["items"][7])])
    assert torch.allclose(table.rows[7], alone[0], atol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_all_processes_come_back_in_order(processes):
    """Seven sequences of other lengths: each process encodes its share, and the gathered states are in place."""
    sequences = [[number] * length for number, length in enumerate([3, 1, 4, 1, 5, 9, 2])]
    encode = lambda given: torch.tensor([[float(sequence[0]), len(sequence)] for sequence in given])  # noqa: E731
    shares = []
    for number in range(processes):
        accelerator = SimpleNamespace(num_processes=processes, process_index=number)
        accelerator.gather = lambda states: shares.append(states) or torch.zeros(processes * len(states), 2)
        share_encoding(encode, accelerator, None)(sequences)
    accelerator = SimpleNamespace(num_processes=processes, process_index=0, gather=lambda _: torch.cat(shares))
    states = share_encoding(encode, accelerator, None)(sequences)
    assert states.tolist() == [[number, len(sequence)] for number, sequence in enumerate(sequences)]
    assert len({len(share) for share in shares}) == 1
