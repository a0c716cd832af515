"""
Turn a raw source into an audited dataset folder: one command, every drop counted, the same bytes every time.

    python recipes/prepare_data.py --source sequences --input DIR --output FOLDER \
        --category "industrial or scientific product"

`--max_items 500 --max_users 300` cuts it to what a CPU can train on.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from r2ec_trl.cli import parse, run
from r2ec_trl.data import cut_dataset, import_sequences, save_dataset_folder
from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.schema import ITEMS, refuse_to_overwrite
from r2ec_trl.data.text import item_text


@dataclass
class PrepareArguments:
    """What to read, how to bring it to the dataset folder, and where to write it."""

    source: Literal["sequences"] = field(metadata={"help": "Kind of source."})
    input: str = field(metadata={"help": "Folder of the source."})
    output: str = field(metadata={"help": "Dataset folder to create; an existing one is never overwritten."})
    category: str = field(default="item", metadata={"help": "What an item is, singular, for the prompts."})
    category_plural: str | None = field(default=None, metadata={"help": "Its plural; the singular with an s."})
    item_fields: list[str] | None = field(default=None, metadata={"help": "Item fields besides the title, in order."})
    max_field_words: int | None = field(default=100, metadata={"help": "Words kept of each item field."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and count them."})
    max_items: int | None = field(default=None, metadata={"help": "Cut to this many items, the most frequent."})
    max_users: int | None = field(default=None, metadata={"help": "Cut to this many users in each split."})


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    (args,) = parse((PrepareArguments,), description=__doc__)
    refuse_to_overwrite(args.output)
    dropped: Counter[str] = Counter()
    dataset = import_sequences(args.input, skip_bad_rows=args.skip_bad_rows, dropped=dropped)
    dataset[ITEMS] = to_dataset(item_text(dataset[ITEMS].to_polars(), args.item_fields, args.max_field_words))
    if args.max_items is not None or args.max_users is not None:
        dataset = cut_dataset(dataset, max_items=args.max_items, max_users=args.max_users, dropped=dropped)
    card = {
        "source": "sequences",
        "category": args.category,
        "category_plural": args.category_plural or f"{args.category}s",
        "dropped": dict(dropped),
        "split_rule": "given",
        "synthetic": False,
    }
    save_dataset_folder(dataset, args.output, card)
    table = Table("split or drop", "rows", title=args.output)
    for name, count in [*((split, len(dataset[split])) for split in dataset), *dropped.items()]:
        table.add_row(name, f"{count:,}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
