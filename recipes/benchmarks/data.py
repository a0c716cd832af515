"""From a raw file to a dataset folder, against the plain pandas-and-dictionaries way, and at 10 M interactions."""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from benchmarks.timing import compare, measured
from datasets import Dataset, DatasetDict, load_from_disk

from r2ec_trl.cli.parsing import parse
from r2ec_trl.data import Filters, SplitRule, import_amazon, load_dataset_folder, prepare, save_dataset_folder
from r2ec_trl.data.generate import CATEGORY, generate_amazon
from r2ec_trl.errors import UserError

CORE, WINDOW = 5, 20
_CARD = {"source": "generated", "category": "item", "category_plural": "items", "dropped": {}}


@dataclass
class DataArguments:
    """Sizes of the case; users are a tenth and items a twentieth of the interactions."""

    rows: int = field(default=1_000_000, metadata={"help": "Interactions of the comparison with the twin."})
    large_rows: int = field(default=10_000_000, metadata={"help": "Interactions of the run at scale; 0 skips it."})
    rounds: int = field(default=1, metadata={"help": "Rounds of A B B A."})
    folder: str | None = field(
        default=None, metadata={"help": "Where to put the files (default: a temporary folder)."}
    )


def run(words: Sequence[str]) -> dict[str, Any]:
    """Parity, then the ratio, then the run at scale."""
    (args,) = parse((DataArguments,), words, description=__doc__)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(args, Path(folder))


def measure(args: DataArguments, folder: Path) -> dict[str, Any]:
    """The case in a folder of its own."""
    datasets.disable_progress_bars()
    raw = generate_amazon(folder / "raw", args.rows, args.rows // 10, args.rows // 20, kind="csv.gz")
    fast, slow = folder / "fast", folder / "slow"

    def parity() -> None:
        ours(raw, fast)
        twin(raw, slow)
        check_parity(fast, slow)

    size = f"{args.rows / 1e6:g} M interactions to a dataset folder"
    against = "pandas and dictionaries"
    times = compare(
        lambda: ours(raw, fast), lambda: twin(raw, slow), what=size, against=against, parity=parity, rounds=args.rounds
    )
    by_sets = measured(lambda: twin(raw, slow, set))[0]
    result = {
        "rows": args.rows,
        "comparisons": [times],
        "ratio_with_set_lookups": round(times["ours_cpu_seconds"] / by_sets, 3),
    }
    if args.large_rows:
        shutil.rmtree(raw)
        generate_amazon(folder / "large", args.large_rows, args.large_rows // 10, args.large_rows // 20)
        result["large"] = {"rows": args.large_rows, **whole_recipe(folder / "large", folder / "out")}
    return result


def ours(raw: Path, output: Path) -> None:
    """The library: read, filter, split, cut windows, validate, digest, write."""
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=raw) as scratch:
        rule = SplitRule("leave_one_out", max_history=WINDOW)
        filters = Filters(user_core=CORE, item_core=CORE)
        done = prepare(import_amazon(CATEGORY, raw), rule, scratch, filters=filters, max_field_words=100)
        save_dataset_folder(done.dataset, output, {**_CARD, "split_rule": rule.name, "synthetic": True})


def whole_recipe(raw: Path, output: Path) -> dict[str, Any]:
    """The command as a user runs it, audit included: wall time and peak memory of its process."""
    recipe = Path(__file__).parents[1] / "prepare_data.py"
    words = ["--source", "amazon", "--amazon_category", CATEGORY, "--input", str(raw), "--output", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(recipe), *words, "--k_core", str(CORE), "--max_history", str(WINDOW)],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise UserError(
            f"prepare_data.py failed with status {os.waitstatus_to_exitcode(status)}: see its message above."
        )
    splits = load_from_disk(str(output))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / (1 << 20), 2),
        "folder_gib": round(sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / (1 << 30), 2),
        **{split: len(rows) for split, rows in splits.items()},
    }


def check_parity(fast: Path, slow: Path) -> None:
    """No timing is worth printing if the two ways differ."""
    left, right = load_dataset_folder(fast), load_from_disk(str(slow))
    for split, keys in (("train", ["user_id", "timestamp"]), ("validation", ["user_id"]), ("test", ["user_id"])):
        columns = ["user_id", "history", "target", "history_ratings", "history_timestamps", "timestamp"]
        ordered = [part[split].select_columns(columns).to_pandas().sort_values(keys) for part in (left, right)]
        for column in columns:
            values = [frame[column].map(list if column.startswith("history") else str) for frame in ordered]
            if values[0].tolist() != values[1].tolist():
                raise UserError(
                    f"The library and its twin differ in column '{column}' of '{split}': no timing is given."
                )
    items = [part["items"].to_pandas().sort_values("item_id") for part in (left, right)]
    for column in ("item_id", "title", "description"):
        if items[0][column].tolist() != items[1][column].tolist():
            raise UserError(f"The library and its twin differ in the items' '{column}': no timing is given.")


def twin(raw: Path, output: Path, collection: type = list) -> None:
    """
    The plain way, step for step what the reference implementation does: lines parsed one by one, frames filtered by
    lists, records, dictionaries, and rows that carry ids, numbers and titles as Python lists. While titles are
    collected, membership is looked up in a `collection`: the reference's list, or a set.
    """
    shutil.rmtree(output, ignore_errors=True)
    metadata = _read_items(raw / f"meta_{CATEGORY}.jsonl.gz")
    reviews = pd.read_csv(raw / f"{CATEGORY}.csv.gz")
    reviews = reviews[reviews["parent_asin"].isin([item["parent_asin"] for item in metadata])]
    reviews = _core(reviews)
    bought = collection(reviews["parent_asin"].unique().tolist())
    titles = {item["parent_asin"]: item["title"] for item in metadata if item["parent_asin"] in bought}
    numbers = {item: number for number, item in enumerate(titles, start=1)}
    rows = _rows(_histories(reviews), numbers, titles)
    splits = {split: Dataset.from_pandas(pd.DataFrame(part, columns=_COLUMNS)) for split, part in rows.items()}
    splits["items"] = Dataset.from_pandas(_items(metadata, titles))
    DatasetDict(splits).save_to_disk(str(output))


_COLUMNS = ["user_id", "history", "target", "history_numbers", "number", "history_titles", "title"]
_COLUMNS += ["history_ratings", "rating", "history_timestamps", "timestamp"]


def _read_items(path: Path) -> list[dict[str, Any]]:
    items = []
    with gzip.open(path) as file:
        for line in file:
            item = json.loads(line)
            items.append({name: _clean(value) if isinstance(value, str) else value for name, value in item.items()})
    return items


def _core(reviews: pd.DataFrame) -> pd.DataFrame:
    while True:
        users = reviews.groupby("user_id").size()
        items = reviews.groupby("parent_asin").size()
        rare = [users[users < CORE].index.tolist(), items[items < CORE].index.tolist()]
        if not rare[0] and not rare[1]:
            return reviews
        reviews = reviews[~(reviews["user_id"].isin(rare[0]) | reviews["parent_asin"].isin(rare[1]))]


def _histories(reviews: pd.DataFrame) -> dict[str, list]:
    histories: dict[str, list] = {}
    for review in reviews.to_dict(orient="records"):
        entry = (review["timestamp"], review["parent_asin"], review["rating"])
        histories.setdefault(review["user_id"], []).append(entry)
    for events in histories.values():
        events.sort(key=lambda event: event[0])
    return histories


def _rows(histories: dict[str, list], numbers: dict[str, int], titles: dict[str, str]) -> dict[str, list]:
    rows: dict[str, list] = {"train": [], "validation": [], "test": []}
    for user, events in histories.items():
        items, ratings = [event[1] for event in events], [event[2] for event in events]
        own_numbers, own_titles = [numbers[item] for item in items], [titles[item] for item in items]
        times = [event[0] // 1000 for event in events]
        for at in range(1, len(events)):
            split = {1: "test", 2: "validation"}.get(len(events) - at, "train")
            row: list[Any] = [user]
            for values in (items, own_numbers, own_titles, ratings, times):
                row += [values[max(0, at - WINDOW) : at], values[at]]
            rows[split].append(row)
    return {split: sorted(part, key=lambda row: row[-1]) for split, part in rows.items()}


def _items(metadata: list[dict[str, Any]], titles: dict[str, str]) -> pd.DataFrame:
    frame = pd.DataFrame(metadata)
    frame = frame[frame["parent_asin"].isin(list(titles))].rename(columns={"parent_asin": "item_id"})
    for name in ("description", "features", "categories"):
        frame[name] = frame[name].apply(lambda parts: _clean(" ".join(parts)))
    return frame


def _clean(text: str) -> str:
    text = re.sub(r"<[^>]+>", " ", html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()
