"""
Baselines on the rows, catalogue and mask of a dataset folder, tuned on its validation rows; a report each.

    python recipes/baselines.py --dataset DATASET_FOLDER --output_dir outputs/baselines
    python recipes/baselines.py --dataset DATASET_FOLDER --text_encoder NAME_OR_FOLDER --systems sasrec text_neighbours

Popularity, recent popularity (where rows have times), item-to-item counts, EASE, SASRec and HSTU (RecTools), and with
`--text_encoder` the nearest texts. Those from EASE on need `pip install -e ".[baselines]"`. The grids stand in
r2ec_trl/evaluation/learned_baselines.py; the settings with the highest validation NDCG@10 (history not masked) are
chosen. `OUTPUT/NAME` holds `metrics.json` and `ranks.parquet` as evaluate.py writes them, so that compare.py takes
both. Hardware: a CPU; figures and times: docs/results.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from rich import get_console

from r2ec_trl.cli.dataset_choice import DataArguments, load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.run_end import described, full_report
from r2ec_trl.cli.run_start import check_writable
from r2ec_trl.cli.tables import systems_table
from r2ec_trl.cli.terminal import say, start_logging
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation import learned_baselines as learned
from r2ec_trl.evaluation.baselines import baseline_frame, item_to_item, popularity
from r2ec_trl.evaluation.report import protocol, write_report
from r2ec_trl.evaluation.users import first_rows

SYSTEMS = ("popularity", "recent_popularity", "item_to_item", "ease", "sasrec", "hstu", "text_neighbours")
COUNTS = ("popularity", "recent_popularity", "item_to_item")  # what nothing need be installed for


@dataclass
class BaselineArguments(DataArguments):
    """Which baselines, and on what."""

    output_dir: str = field(default="outputs/baselines", metadata={"help": "Folder of the results, one a system."})
    systems: list[str] = field(
        default_factory=list, metadata={"help": f"Of {', '.join(SYSTEMS)}; by default all that the data allow."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Name or folder of the sentence encoder of text_neighbours."}
    )
    max_history_items: int = field(
        default=20, metadata={"help": "Newest purchases that item-to-item, SASRec, HSTU read."}
    )
    max_eval_users: int | None = field(
        default=None, metadata={"help": "First so many rows of validation and of test."}
    )
    split: str = field(default="test", metadata={"help": "Split to report.", "choices": ["validation", "test"]})
    seed: int = field(default=0, metadata={"help": "Seed of the neural ones and of the bootstrap."})

    def __post_init__(self) -> None:
        for name in self.systems:
            if name not in SYSTEMS:
                raise UserError(f"`systems` names {name!r}; give some of {', '.join(SYSTEMS)}.")
        if "text_neighbours" in self.systems and self.text_encoder is None:
            raise UserError("text_neighbours needs --text_encoder, the name or folder of a sentence encoder.")
        if self.text_encoder is not None and self.systems and "text_neighbours" not in self.systems:
            raise UserError("--text_encoder is read by text_neighbours alone; add that to --systems or leave it out.")
        readers = {"item_to_item", "sasrec", "hstu"}
        if self.max_history_items != BaselineArguments.max_history_items and self.systems:
            if not readers & set(self.systems):
                raise UserError(f"--max_history_items is read by {', '.join(sorted(readers))} alone; leave it out.")
        if self.max_eval_users is not None and self.max_eval_users < 1:
            raise UserError(f"`max_eval_users` is {self.max_eval_users}; give at least 1.")


def chosen_systems(args: BaselineArguments, train: Dataset) -> list[str]:
    """The systems of the command line, or all but those that lack times or an encoder, which is said."""
    if args.systems:
        return args.systems
    lacking = {
        "recent_popularity": "timestamp" not in train.column_names,
        "text_neighbours": args.text_encoder is None,
    }
    for name in [name for name, lacks in lacking.items() if lacks]:
        say(f"Left out: {name} ({'no --text_encoder' if name.startswith('text') else 'the rows have no times'}).")
    return [name for name in SYSTEMS if not lacking.get(name)]


def paths_of(name: str, args: BaselineArguments, dataset: DatasetDict) -> Any:
    """What a system tries; see [`~r2ec_trl.evaluation.learned_baselines.tune`]."""
    train, item_ids, length = dataset["train"], dataset["items"]["item_id"][:], args.max_history_items
    makers: dict[str, Callable[[], Any]] = {
        "popularity": lambda: [[({}, popularity(train, item_ids))]],
        "recent_popularity": lambda: learned.recent_popularity(train, item_ids),
        "item_to_item": lambda: [[({"max_history_items": length}, item_to_item(train, item_ids, length))]],
        "ease": lambda: learned.ease(train, item_ids),
        "sasrec": lambda: learned.sasrec(train, item_ids, length, args.seed),
        "hstu": lambda: learned.hstu(train, item_ids, length, args.seed),
        "text_neighbours": lambda: learned.text_neighbours(train, dataset["items"], str(args.text_encoder)),
    }
    return makers[name]()


def main() -> None:
    (args,) = parse((BaselineArguments,), description=__doc__)
    start_logging(True)
    check_writable(args.output_dir)
    dataset, card = load_dataset(args.dataset, args.output_dir)
    names = chosen_systems(args, dataset["train"])
    for name in names:
        check_installed(name)
    validation, test = (first_rows(dataset[split], args.max_eval_users) for split in ("validation", args.split))
    reports = {}
    for name in names:
        baseline, tries = learned.tune(paths_of(name, args, dataset), validation, partial(tell, name))
        frame = described(baseline_frame(baseline, test), dataset, test)
        found = {
            "baseline": name,
            **tries[0]["settings"],
            **({} if name in COUNTS else {"versions": versions_of(name)}),
        }
        if name == "text_neighbours":
            found["text_encoder"] = Path(str(args.text_encoder)).name
        facts = protocol(card, found, args.seed, args.split)
        reports[name] = {**full_report(frame, {}, facts, dataset, test), "tuning": tries}
        write_report(Path(args.output_dir) / name, reports[name], frame)
    get_console().print(systems_table(reports))


def tell(name: str, settings: dict[str, Any], value: float) -> None:
    """A line for each try."""
    words = ", ".join(f"{key} {one}" for key, one in settings.items()) or "nothing to tune"
    say(f"{name} ({words}): validation NDCG@10 {value:.4f}")


def versions_of(name: str) -> dict[str, str]:
    """Of the library that a learnt baseline is made by."""
    library = "sentence-transformers" if name == "text_neighbours" else "rectools"
    return {library: version(library)}


def check_installed(name: str) -> None:
    """Raise [`UserError`] before anything is trained where a library is missing."""
    if name in COUNTS:
        return
    try:
        versions_of(name)
    except ImportError as error:
        raise UserError(
            f"{name} needs {error.name}; pip install 'r2ec_trl[baselines]', or name other --systems."
        ) from None


if __name__ == "__main__":
    run(main)
