"""Several processes: item prompts and users shared out, and what ZeRO-3 cannot do."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from r2ec_trl.errors import UserError
from r2ec_trl.items.sliced_table import SlicedTable
from r2ec_trl.items.table import Encoder, ItemTable


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


def own_rows(dataset: Dataset, accelerator: Accelerator) -> Dataset:
    """This process's share of a dataset's rows, dealt out one by one; row 0 where none is left for it."""
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    return dataset.select(list(rows) or [0])


def gather_rows(frame: pl.DataFrame, rows: int) -> pl.DataFrame:
    """
    The frames that all processes made of their [`own_rows`], one row each, as one frame in the dataset's order.

    Args:
        frame (`polars.DataFrame`):
            This process's.
        rows (`int`):
            Rows of the whole dataset.
    """
    frames = gather_object([frame])
    places = [range(rank, rows, len(frames)) for rank in range(len(frames))]
    placed = [
        one[: len(place)].with_columns(row=pl.Series(place, dtype=pl.Int64))
        for one, place in zip(frames, places, strict=True)
    ]
    return pl.concat(placed).sort("row").drop("row")


def check_sharding(args: Any, trains_adapter: bool) -> None:
    """
    Refuse what DeepSpeed cannot do with our forwards.

    Args:
        args ([`~r2ec_trl.recpo_config.RecPOConfig`]):
            Settings.
        trains_adapter (`bool`):
            Whether a LoRA adapter is trained.

    Raises:
        [`UserError`]: under ZeRO-3, where rollouts and scores would gather weights layer by layer, or the candidates'
        encoding would meet reentrant checkpointing.
    """
    if not is_deepspeed_zero3_enabled():
        return
    if not args.ds3_gather_for_generation:
        raise UserError(
            "`ds3_gather_for_generation=False` under ZeRO-3 breaks DeepSpeed's record of the order of layers, since "
            "scoring runs the backbone without the LM head; leave it on, or use ZeRO-2."
        )
    if trains_adapter and args.gradient_checkpointing and args.item_coef and args.item_gradient != "none":
        raise UserError(
            "ZeRO-3 with LoRA and gradient checkpointing cannot encode the candidates with gradient (TRL makes the "
            "checkpointing reentrant there); add `--gradient_checkpointing false`, or `--item_gradient none`, or "
            "launch with accelerate_configs/zero2.yaml."
        )
