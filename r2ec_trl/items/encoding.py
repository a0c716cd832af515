"""From item prompts to table rows: the encoder, the empty table, and the work shared out over processes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from r2ec_trl.items.sliced_table import SlicedTable
from r2ec_trl.items.table import Encoder, ItemTable
from r2ec_trl.policy.answer_state import encode_states
from r2ec_trl.policy.prompts import Prompts


def make_encoder(model: torch.nn.Module, prompts: Prompts, token_budget: int) -> Callable[..., torch.Tensor]:
    """Token sequences → states with `model` as it is now; for [`~r2ec_trl.items.table.ItemTable.refresh`]."""
    pad_token_id = prompts.tokenizer.pad_token_id
    return partial(encode_states, model, pad_token_id=pad_token_id, token_budget=token_budget)


def make_table(
    prompts: Prompts, item_dataset: Dataset, similarity: str, device: torch.device | str, slices: Any = None
) -> ItemTable:
    """
    An empty [`~r2ec_trl.items.table.ItemTable`] of a catalogue under these prompts; shared out over the processes of
    an [`~accelerate.Accelerator`] where `slices` is one.
    """
    parts = (item_dataset["item_id"][:], prompts.catalogue_ids(item_dataset), similarity, device)
    if slices is None or slices.num_processes == 1:
        return ItemTable(*parts)
    return SlicedTable(*parts, accelerator=slices)


def share_encoding(encoder: Encoder, accelerator: Accelerator, table: ItemTable) -> Encoder:
    """
    An encoder for refreshing a table: each process does its share, and every process gets all states. A sliced table
    shares out the rows by itself.

    Call it on every process with the same sequences. They are dealt out by length, so that shares cost the same; the
    states of all processes are then equal bit for bit.

    Args:
        encoder (`Callable`):
            Token sequences → states `(n, d)`.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes.
        table ([`~r2ec_trl.items.table.ItemTable`]):
            What it encodes for.
    """
    processes = accelerator.num_processes
    if processes == 1 or isinstance(table, SlicedTable):
        return encoder

    def encode(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
        share = -(-len(order) // processes)
        dealt = order + order[-1:] * (share * processes - len(order))  # the shortest once more, or shares would differ
        mine = dealt[accelerator.process_index :: processes]
        states = accelerator.gather(encoder([sequences[i] for i in mine]))  # (processes * share, d), by process
        states = states.view(processes, share, -1).transpose(0, 1).flatten(0, 1)[: len(order)]  # as dealt
        return states[torch.tensor(order, device=states.device).argsort()]

    return encode
