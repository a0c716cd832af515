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
import math
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import DatasetDict
from rich.console import Console

from r2ec_trl.cli.audit_tables import audit_tables
from r2ec_trl.cli.parsing import OneKeyLoader, parse, run
from r2ec_trl.cli.terminal import WorkDisplay, start_logging
from r2ec_trl.data import (
    Filters,
    ItemFilter,
    SplitRule,
    audit_dataset,
    check_folder,
    cut_dataset,
    load_dataset_card,
    prepare,
)
from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.events import parse_date
from r2ec_trl.data.schema import ITEMS, refuse_to_overwrite, write_dataset
from r2ec_trl.data.sources import KINDS, kind_of
from r2ec_trl.data.sources.amazon import DOWNLOADS
from r2ec_trl.data.text import item_text
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.files import build_folder

logger = logging.getLogger("r2ec_trl")


@dataclass
class SourceArguments:
    """What to read."""

    source: str | None = field(default=None, metadata={"help": "Kind of source.", "choices": KINDS})
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
    timestamp_unit: Literal["s", "ms", "us", "ns"] = field(
        default="s", metadata={"help": "Table and RecBole: unit of the time."}
    )
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


ARGUMENTS = (SourceArguments, FilterArguments, SplitArguments, OutputArguments)
# A flag that says nothing unless another one is as the test wants it.
ONLY_WITH: dict[str, tuple[str, Any, str]] = {
    "ratio": ("split", lambda value: value == "time_ratio", "time_ratio"),
    "validation_from": ("split", lambda value: value == "time_cut", "time_cut"),
    "test_from": ("split", lambda value: value == "time_cut", "time_cut"),
    "split_column": ("split", lambda value: value == "given", "given"),
    "window_min_items": ("window_start", bool, "DAY"),
    "window_step_months": ("window_min_items", bool, "NUMBER"),
    "published_counts": ("source", lambda value: value == "amazon", "amazon"),
    "download_dir": ("input", lambda value: value == "authors" or "://" in str(value), "authors or a URL"),
}
AT_LEAST = {"user_core": 0, "item_core": 0, "k_core": 0, "max_title_words": 1, "window_min_items": 0, "max_users": 0}
AT_LEAST |= {"window_step_months": 1, "min_history": 1, "max_history": 1, "max_field_words": 1, "max_items": 0}


def main() -> None:
    start_logging()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    source, filters, split, output = arguments = parse(ARGUMENTS, description=__doc__)
    said = {word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
    check_flags({name: value for part in arguments for name, value in vars(part).items()}, said)
    if output.check:
        check(output.check)
        return
    published = _published(output.published_counts, source.amazon_category)
    refuse_to_overwrite(output.output)
    if output.tokenizer:
        from r2ec_trl.policy.prompt_lengths import load_tokenizer, prompt_lengths  # torch takes seconds to import

        load_tokenizer(output.tokenizer)  # before the long work
    with WorkDisplay(), build_folder(output.output) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        dataset, card = build(source, filters, split, output, scratch)
        audit = audit_dataset(dataset, card["split_rule"])
        if published:
            users = card["facts"].get("users", audit["users"])  # those of a cut are counted in its rows
            here = {"users": users, **{split: len(rows) for split, rows in dataset.items()}}
            card["published"] = {
                name: {"published": count, "here": here[name]} for name, count in published.items() if name in here
            }
        if output.tokenizer:
            card["prompt_lengths"] = prompt_lengths(dataset, output.tokenizer, output.category)
        write_dataset(dataset, folder, {**card, "audit": audit}, output.output)
        for file in (*scratch.iterdir(), scratch):
            file.rmdir() if file.is_dir() else file.unlink()
    show(audit, load_dataset_card(output.output))
    if any(audit["leakage"].values()):
        logger.warning("%s is written, but its splits leak: see the table of leakage.", output.output)


def check_flags(values: dict[str, Any], said: Collection[str] = ()) -> None:
    """
    Refuse what cannot be meant: flags that the source or other flags leave without effect, nonsense numbers. A flag
    that was `said` asks for its default too, unless that is to do nothing.
    """
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory()
        for part in ARGUMENTS
        for one in fields(part)
    }
    given = [name for name, value in values.items() if value != defaults[name] or (value and name in said)]
    if values["check"]:
        if given != ["check"]:
            raise UserError(f"--check audits a folder alone: leave --{given[given[0] == 'check']} out.")
        return
    if not values["source"] or not values["output"]:
        raise UserError("--source and --output are needed (or --check FOLDER to audit a folder).")
    kind = kind_of(values["source"])
    for name in kind.needs:
        if not values[name]:
            example = ", such as Video_Games" if name == "amazon_category" else ""
            raise UserError(f"--source {values['source']} needs --{name}{example}: add it.")
    filtering = {one.name for part in (FilterArguments, SplitArguments) for one in fields(part)}
    used = {"source", *kind.parameters, *(one.name for one in fields(OutputArguments))}
    used |= set() if kind.ready else filtering
    for name in given:
        if name not in used:
            raise UserError(f"--{name} does not apply to --source {values['source']}: leave it out.")
        other, test, wanted = ONLY_WITH.get(name, ("", None, ""))
        if other and not test(values[other]):
            raise UserError(f"--{name} does nothing without --{other} {wanted}: add that or leave it out.")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise UserError(f"--{name} {values[name]} is no number to compare with: give a finite one.")
        if name in AT_LEAST and values[name] is not None and not AT_LEAST[name] <= values[name] < 1 << 31:
            raise UserError(f"--{name} {values[name]} cannot be: give at least {AT_LEAST[name]}.")
    if values["k_core"] and values["user_core"] is not None and values["item_core"] is not None:
        raise UserError("--k_core does nothing beside --user_core and --item_core: leave it out.")
    if values["title_column"] and values["source"] == "table" and not values["items"]:
        raise UserError("--title_column does nothing without --items FILE: add that or leave it out.")
    if not values["category"].strip():
        raise UserError("--category is empty: say in a word what an item is.")


def build(
    source: SourceArguments, filters: FilterArguments, split: SplitArguments, output: OutputArguments, scratch: Path
) -> tuple[DatasetDict, dict[str, Any]]:
    """The four splits and the card, without the audit."""
    kind, values = kind_of(source.source or ""), vars(source)
    dropped: Counter[str] = Counter()
    arguments = {name: values[flag] for flag, name in kind.parameters.items() if values[flag] is not None}
    if kind.ready:
        dataset = kind.read(**arguments, dropped=dropped)
        dataset[ITEMS] = to_dataset(item_text(dataset[ITEMS].to_polars(), output.item_fields, output.max_field_words))
        name, facts, rule = f"{source.source}: {Path(source.input or '').name}", {}, "given"
    else:
        rule, wanted, split_rule = split.split, _filters(filters), _split_rule(split)
        raw = kind.read(**arguments)  # which is long: what cannot be meant is refused before
        name, missing_title = raw.name, "id" if raw.items.is_empty() else filters.missing_title
        done = prepare(
            raw,
            split_rule,
            scratch,
            filters=wanted,
            item_filter=ItemFilter(
                filters.require_price, filters.max_title_words, filters.drop_markup_titles, missing_title
            ),
            item_fields=output.item_fields,
            max_field_words=output.max_field_words,
        )
        dataset, dropped, facts = done.dataset, done.dropped, done.facts
    if output.max_items is not None or output.max_users is not None:
        facts = {"before the cut": facts} if facts else {}
        dataset = cut_dataset(dataset, max_items=output.max_items, max_users=output.max_users, dropped=dropped)
    texts = {one: vars(output)[one] for one in ("item_fields", "max_field_words", "max_items", "max_users")}
    card = {
        "source": name,
        "category": output.category,
        "category_plural": output.category_plural or f"{output.category}s",
        "split_rule": rule,
        "synthetic": False,
        "settings": {**({} if kind.ready else {**vars(filters), **vars(split)}), **texts},
        "facts": facts,
        "dropped": {cause: count for cause, count in dropped.items() if count},
    }
    return dataset, card


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


def _split_rule(args: SplitArguments) -> SplitRule:
    rule = SplitRule(
        args.split,
        tuple(args.ratio),
        parse_date(args.validation_from, "--validation_from"),
        parse_date(args.test_from, "--test_from"),
        args.min_history,
        args.max_history,
        args.train_targets,
    )
    rule.check()
    return rule


def _published(path: str | None, category: str | None) -> dict[str, int]:
    """Published counts of a category: users and rows of the splits."""
    if path is None:
        return {}
    # what a config of ours names is found from anywhere
    file = Path(path) if Path(path).exists() else Path(__file__).parents[1] / path
    try:
        counts = yaml.load(file.read_text(encoding="utf-8"), Loader=OneKeyLoader)
        found = (counts or {}).get(category) or {}
        wrong = [name for name, count in found.items() if not isinstance(count, int) or count < 1]
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"--published_counts {path} cannot be read as counts by category ({first_line(error)})."
        ) from error
    if wrong:
        raise UserError(f"--published_counts {path}: {wrong[0]!r} of {category} is no count.")
    if not found:
        logger.warning("%s has no counts of %s to compare with.", path, category)
    return found


if __name__ == "__main__":
    run(main)
