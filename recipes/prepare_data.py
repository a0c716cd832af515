"""
Turn a raw source into an audited dataset folder: one command, every drop counted, the same bytes every time.

    # Amazon Reviews 2023, any category, with the paper's settings (downloads; compares with the published counts)
    python recipes/prepare_data.py --config recipes/configs/data_paper.yaml --amazon_category Video_Games \
        --category "video game" --output games
    # the same from files already here
    python recipes/prepare_data.py --config recipes/configs/data_paper.yaml --amazon_category Video_Games \
        --category "video game" --input DIR --output games
    # MovieLens, RecBole's atomic files, any table, ready sequences
    python recipes/prepare_data.py --source movielens --input ml-1m --output ml1m --category film
    python recipes/prepare_data.py --source recbole --input ml-100k --output ml100k --category film
    python recipes/prepare_data.py --source table --input log.parquet --items items.csv --user_column customer \
        --time_column bought_at --timestamp_unit ms --output shop --category product
    python recipes/prepare_data.py --source sequences --input DIR --output sequences --category product
    # audit a folder; the exit status is 2 on leakage
    python recipes/prepare_data.py --check FOLDER

`--max_items 500 --max_users 300` cuts any of them to what a CPU can train on.

Hardware: a CPU. Run times on 2 cores: see `recipes/benchmark.py --case data`.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.data import (
    Filters,
    ItemFilter,
    Source,
    SplitRule,
    audit_dataset,
    check_folder,
    cut_dataset,
    import_amazon,
    import_movielens,
    import_recbole,
    import_sequences,
    import_table,
    load_dataset_card,
    prepare,
    prompt_lengths,
    save_dataset_folder,
)
from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.events import parse_date
from r2ec_trl.data.schema import ITEMS, refuse_to_overwrite
from r2ec_trl.data.sources.amazon import DOWNLOADS
from r2ec_trl.data.tables import audit_tables
from r2ec_trl.data.text import item_text
from r2ec_trl.errors import UserError

logger = logging.getLogger("r2ec_trl")


@dataclass
class SourceArguments:
    """What to read."""

    source: Literal["amazon", "movielens", "recbole", "table", "sequences"] | None = field(
        default=None, metadata={"help": "Kind of source."}
    )
    input: str | None = field(
        default=None, metadata={"help": "Folder or file; for amazon also 'hub', 'authors' or a URL (default: hub)."}
    )
    amazon_category: str | None = field(default=None, metadata={"help": "As in the file names: Video_Games."})
    reviews: str = field(
        default="5core", metadata={"help": "Amazon: raw, 0core, 5core, or a benchmark split such as 5core_last_out."}
    )
    download_dir: str = field(default=DOWNLOADS, metadata={"help": "Where files fetched by URL are kept."})
    items: str | None = field(default=None, metadata={"help": "Table: file of the items."})
    user_column: str = field(default="user_id", metadata={"help": "Table and RecBole: column of the user."})
    item_column: str = field(default="item_id", metadata={"help": "Table and RecBole: column of the item."})
    rating_column: str = field(default="rating", metadata={"help": "Table and RecBole: column of the rating, if any."})
    time_column: str = field(default="timestamp", metadata={"help": "Table and RecBole: column of the time."})
    title_column: str | None = field(default=None, metadata={"help": "Table and RecBole: column of the title."})
    split_column: str | None = field(default=None, metadata={"help": "Table: column with train, validation, test."})
    timestamp_unit: Literal["s", "ms", "us"] = field(default="s", metadata={"help": "Table: unit of the time."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out and count them."})


@dataclass
class FilterArguments:
    """What to leave out, in this order; everything is counted."""

    repeats: Literal["keep", "first", "last"] = field(
        default="keep", metadata={"help": "The same item again by the same user: keep all, the first or the last."}
    )
    min_rating: float | None = field(default=None, metadata={"help": "Drop interactions rated lower."})
    missing_title: Literal["drop", "id"] = field(
        default="drop", metadata={"help": "Items without a title: drop them, or name them by their id."}
    )
    require_price: bool = field(default=False, metadata={"help": "Drop items without a price (the reference does)."})
    max_title_words: int | None = field(
        default=None,
        metadata={"help": "Drop items with a longer title (the reference: 20, another version of it 50)."},
    )
    drop_markup_titles: bool = field(
        default=False, metadata={"help": "Drop items with '<span id' in the title (the reference does)."}
    )
    window_start: str | None = field(default=None, metadata={"help": "First day, such as 2022-10-01 (UTC)."})
    window_end: str | None = field(default=None, metadata={"help": "Day after the last."})
    window_min_items: int = field(default=0, metadata={"help": "Move the start back until so many items are left."})
    window_step_months: int = field(default=1, metadata={"help": "By so many months at a time."})
    k_core: int = field(default=0, metadata={"help": "Fewest interactions of a user and of an item."})
    user_core: int | None = field(default=None, metadata={"help": "The same for users alone."})
    item_core: int | None = field(default=None, metadata={"help": "The same for items alone."})
    tie_break: Literal["hash", "item", "file"] = field(
        default="hash", metadata={"help": "Order of a user's interactions at the same time."}
    )


@dataclass
class SplitArguments:
    """How targets are told apart, and how long histories are."""

    split: Literal["leave_one_out", "time_ratio", "time_cut", "given"] = field(
        default="leave_one_out", metadata={"help": "Split rule; ready sequences are always given."}
    )
    ratio: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1], metadata={"help": "For time_ratio."})
    validation_from: str | None = field(default=None, metadata={"help": "For time_cut: first day of validation."})
    test_from: str | None = field(default=None, metadata={"help": "For time_cut: first day of test."})
    min_history: int = field(default=1, metadata={"help": "Interactions that must lie before a target."})
    max_history: int = field(default=20, metadata={"help": "Longest history: the last so many."})
    train_targets: Literal["all", "last"] = field(default="all", metadata={"help": "Train targets of a user."})


@dataclass
class OutputArguments:
    """What to write."""

    output: str | None = field(
        default=None, metadata={"help": "Dataset folder to create; an existing one is never overwritten."}
    )
    category: str = field(default="item", metadata={"help": "What an item is, singular, for the prompts."})
    category_plural: str | None = field(default=None, metadata={"help": "Its plural (default: with an s)."})
    item_fields: list[str] | None = field(default=None, metadata={"help": "Item fields besides the title, in order."})
    max_field_words: int | None = field(default=100, metadata={"help": "Words kept of each item field."})
    max_items: int | None = field(default=None, metadata={"help": "Cut to this many items, the most frequent."})
    max_users: int | None = field(default=None, metadata={"help": "Cut to this many users in each split."})
    tokenizer: str | None = field(default=None, metadata={"help": "Count prompt tokens with this tokenizer."})
    published_counts: str | None = field(
        default=None, metadata={"help": "YAML file of published counts by Amazon category, to compare with."}
    )
    check: str | None = field(default=None, metadata={"help": "Audit this dataset folder and write nothing."})


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source, filters, split, output = parse(
        (SourceArguments, FilterArguments, SplitArguments, OutputArguments), description=__doc__
    )
    if output.check:
        check(output.check)
        return
    if source.source is None or output.output is None:
        raise UserError("--source and --output are needed (or --check FOLDER to audit a folder).")
    refuse_to_overwrite(output.output)
    folder = next(parent for parent in Path(output.output).absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{Path(output.output).name}.scratch-") as scratch:
        dataset, card = build(source, filters, split, output, scratch)
        published = _published(output.published_counts, source.amazon_category, card["facts"], dataset)
        if published:
            card["published"] = published
        audit = audit_dataset(dataset, card["split_rule"])
        if output.tokenizer:
            card["prompt_lengths"] = prompt_lengths(dataset, output.tokenizer, output.category)
        save_dataset_folder(dataset, output.output, {**card, "audit": audit})
    show(audit, load_dataset_card(output.output))
    if any(audit["leakage"].values()):
        logger.warning("%s is written, but its splits leak: see the table of leakage.", output.output)


def build(
    source: SourceArguments, filters: FilterArguments, split: SplitArguments, output: OutputArguments, scratch: str
) -> tuple[DatasetDict, dict[str, Any]]:
    """The four splits and the card, without the audit."""
    if source.source == "sequences":
        dropped: Counter[str] = Counter()
        dataset = import_sequences(_input(source), skip_bad_rows=source.skip_bad_rows, dropped=dropped)
        dataset[ITEMS] = to_dataset(item_text(dataset[ITEMS].to_polars(), output.item_fields, output.max_field_words))
        name, facts, rule = f"sequences: {Path(_input(source)).name}", {}, "given"
    else:
        rule, raw = split.split, read(source)
        name, missing_title = raw.name, "id" if raw.items.is_empty() else filters.missing_title
        done = prepare(
            raw,
            SplitRule(
                rule,
                tuple(split.ratio),
                parse_date(split.validation_from, "--validation_from"),
                parse_date(split.test_from, "--test_from"),
                split.min_history,
                split.max_history,
                split.train_targets,
            ),
            scratch,
            filters=_filters(filters),
            item_filter=ItemFilter(
                filters.require_price, filters.max_title_words, filters.drop_markup_titles, missing_title
            ),
            item_fields=output.item_fields,
            max_field_words=output.max_field_words,
        )
        dataset, dropped, facts = done.dataset, done.dropped, done.facts
    if output.max_items is not None or output.max_users is not None:
        dataset = cut_dataset(dataset, max_items=output.max_items, max_users=output.max_users, dropped=dropped)
    card = {
        "source": name,
        "category": output.category,
        "category_plural": output.category_plural or f"{output.category}s",
        "split_rule": rule,
        "synthetic": False,
        "settings": {**vars(filters), **vars(split)} if source.source != "sequences" else {},
        "facts": facts,
        "dropped": {cause: count for cause, count in dropped.items() if count},
    }
    return dataset, card


def read(args: SourceArguments) -> Source:
    """The raw source."""
    if args.source == "amazon":
        if not args.amazon_category:
            raise UserError("--source amazon needs --amazon_category, such as Video_Games.")
        with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bars:
            tasks: dict[str, Any] = {}

            def progress(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=total or None)
                bars.update(tasks[name], completed=done)

            return import_amazon(
                args.amazon_category,
                args.input or "hub",
                reviews=args.reviews,
                download_dir=args.download_dir,
                skip_bad_rows=args.skip_bad_rows,
                progress=progress,
            )
    if args.source == "movielens":
        return import_movielens(_input(args), skip_bad_rows=args.skip_bad_rows)
    columns = {"user_column": args.user_column, "item_column": args.item_column, "rating_column": args.rating_column}
    columns["time_column"] = args.time_column
    if args.source == "recbole":
        return import_recbole(
            _input(args), **columns, title_column=args.title_column, skip_bad_rows=args.skip_bad_rows
        )
    return import_table(
        _input(args),
        args.items,
        **columns,
        split_column=args.split_column,
        title_column=args.title_column or "title",
        timestamp_unit=args.timestamp_unit,
        skip_bad_rows=args.skip_bad_rows,
    )


def check(folder: str) -> None:
    """Audit a folder; a fault ends the program with status 2."""
    audit, faults = check_folder(folder)
    show(audit, load_dataset_card(folder))
    if faults:
        raise UserError(f"{folder} is not sound: {'; '.join(faults)}.")


def show(audit: dict[str, Any], card: dict[str, Any]) -> None:
    """Print the audit."""
    console = Console()
    for table in audit_tables(audit, card):
        console.print(table)


def _input(args: SourceArguments) -> str:
    if not args.input:
        raise UserError(f"--source {args.source} needs --input.")
    return args.input


def _filters(args: FilterArguments) -> Filters:
    return Filters(
        min_rating=args.min_rating,
        repeats=args.repeats,
        window_start=parse_date(args.window_start, "--window_start"),
        window_end=parse_date(args.window_end, "--window_end"),
        window_min_items=args.window_min_items,
        window_step_months=args.window_step_months,
        user_core=args.k_core if args.user_core is None else args.user_core,
        item_core=args.k_core if args.item_core is None else args.item_core,
        tie_break=args.tie_break,
    )


def _published(
    path: str | None, category: str | None, facts: dict[str, Any], dataset: DatasetDict
) -> dict[str, dict[str, int]]:
    """Published counts beside ours."""
    if path is None:
        return {}
    published = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get(category)
    if published is None:
        logger.warning("%s has no counts of %s to compare with.", path, category)
        return {}
    here = {"users": facts["users"], **{split: len(rows) for split, rows in dataset.items()}}
    return {name: {"published": count, "here": here[name]} for name, count in published.items()}


if __name__ == "__main__":
    run(main)
