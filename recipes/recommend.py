"""
Recommend for any user: by a bundle, or by a model or adapter with a dataset folder's catalogue.

    python recipes/recommend.py --bundle outputs/demo/bundle --history_titles "orrin red cello strings"
    python recipes/recommend.py --bundle BUNDLE --input users.jsonl --where "price < 50" --format jsonl > out.jsonl
    accelerate launch recipes/recommend.py --bundle BUNDLE --input users.parquet --output FOLDER     # millions
    python recipes/recommend.py --adapter dd101bb/gemma-2b-games --model_name_or_path google/gemma-2-2b-it \
        --prompt_preset reference --dataset DATASET_FOLDER --save_bundle BUNDLE        # then --bundle BUNDLE

A line of `--input` is a list of item ids, or an object with `history` (ids) or `history_titles` (titles, also of items
outside the catalogue) and optionally `history_ratings`, `history_timestamps`, `timestamp` (seconds) and `user_id`.
With `--output` the users are shared out over the processes and read piece by piece; whole Parquet parts are written,
and a run that was killed goes on where it stopped.
Hardware: whatever the model runs on; a bundle loads without encoding anything.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import polars as pl
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from r2ec_trl.bundle.format import check_output
from r2ec_trl.cli.bundle_choice import BundleArguments, engine_of, load_bundle, make_bundle
from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.terminal import WorkDisplay, printable, start_logging
from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.serving.batch import recommend_file
from r2ec_trl.serving.recommender import Recommendation, Recommender
from r2ec_trl.serving.users import read_users


@dataclass
class RecommendArguments(BundleArguments):
    """Who is recommended what, and how it is shown."""

    history: list[str] | None = field(default=None, metadata={"help": "One user's purchases as item ids."})
    history_titles: list[str] | None = field(default=None, metadata={"help": "One user's purchases as titles."})
    history_ratings: list[float] | None = field(default=None, metadata={"help": "Their ratings out of 5."})
    input: str | None = field(default=None, metadata={"help": "JSON lines of users; '-' is standard input."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for Parquet parts: --input may then be Parquet and of any length."}
    )
    part_users: int = field(default=1000, metadata={"help": "Users a part of --output; one part is in memory."})
    k: int = field(default=10, metadata={"help": "Items a user."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave out what the user has bought."})
    reasoning: str | None = field(
        default=None, metadata={"help": "'full', 'none', or a text to use. By default as the bundle was evaluated."}
    )
    where: str | None = field(default=None, metadata={"help": 'SQL condition on item columns: "price < 50".'})
    allow: list[str] | None = field(default=None, metadata={"help": "Recommend these item ids only."})
    exclude: list[str] | None = field(default=None, metadata={"help": "Never recommend these item ids."})
    format: str = field(
        default="table",
        metadata={
            "help": "What is printed; csv has the columns user_id, item_id, score, rank (RecTools, RecBole).",
            "choices": ["table", "jsonl", "csv"],
        },
    )
    save_bundle: str | None = field(default=None, metadata={"help": "Write the recommender as a bundle here."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_user = self.history is not None or self.history_titles is not None
        if self.history_ratings is not None and not one_user:
            raise UserError(
                "--history_ratings are of --history or --history_titles; add one, or write them in --input."
            )
        if self.output is None and self.part_users != RecommendArguments.part_users:
            raise UserError("--part_users cuts what --output writes; add --output FOLDER or leave it out.")
        if self.output is not None and (self.input in (None, "-") or one_user):
            raise UserError("--output takes its users from a file alone; add --input FILE and leave --history… out.")
        if self.output is not None and self.format != "table":
            raise UserError("--format is of what is printed, and --output writes Parquet; leave one of the two out.")
        if self.max_eval_users is not None:
            raise UserError("--max_eval_users cuts evaluations; leave it out: every user of --input is answered.")


def users_of(args: RecommendArguments) -> list[Any]:
    """The users of the command line or of the input file."""
    given = [name for name in ("history", "history_titles", "input") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} name different users; give one of the two.")
    if args.input is None:
        user = {name: getattr(args, name) for name in ("history", "history_titles", "history_ratings")}
        return [{name: value for name, value in user.items() if value is not None}] if given else []
    return read_users(sys.stdin if args.input == "-" else args.input)


def show(results: Sequence[Recommendation], console: Console) -> None:
    """A table a user, the reasoning above it."""
    for number, result in enumerate(results):
        name = result.user_id if result.user_id is not None else f"user {number}"
        reasoning = printable(result.reasoning, keep="\n")
        console.print(f"[bold]{escape(printable(name))}[/bold] {escape(reasoning)}")
        table = Table("", "item", "id", "score")
        for rank, item in enumerate(result.items, start=1):
            table.add_row(
                str(rank), escape(printable(item.title)), escape(printable(item.item_id)), f"{item.score:.4f}"
            )
        console.print(table)


def put(text: str) -> None:
    """Print data: as they are into a file or pipe, harmless on a terminal."""
    sys.stdout.write(printable(text, keep="\n") if sys.stdout.isatty() else text)


def main() -> None:
    args, policy_args = parse((RecommendArguments, PolicyArguments), description=__doc__)
    # who has answered its parts waits for the others
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    start_logging(accelerator.is_main_process, Console(stderr=True))
    users = [] if args.output is not None else users_of(args)
    if not users and args.save_bundle is None and args.output is None:
        raise UserError("No user given; add --history, --history_titles or --input (or --save_bundle FOLDER).")
    if users and accelerator.num_processes > 1:
        raise UserError("Users are shared out with --output alone; add --output FOLDER, or launch one process.")
    if args.engine == "vllm" and accelerator.num_processes > 1:
        raise UserError("--engine vllm recommends in one process; launch with `python`, or leave it out.")
    if args.save_bundle is not None:
        check_output(args.save_bundle)
    if args.bundle is None:
        bundle = make_bundle(args, policy_args, *load_dataset(args.dataset))
    elif args.dataset is None:
        bundle = load_bundle(args, policy_args)
    else:
        raise UserError("--dataset is decided by the bundle; leave out one of the two.")
    if args.save_bundle is not None:
        if accelerator.is_main_process:
            bundle.save(args.save_bundle)
        accelerator.wait_for_everyone()
    recommender = Recommender(bundle, engine_of(args, bundle))
    options = {name: getattr(args, name) for name in ("k", "exclude_history", "reasoning", "where", "allow")}
    options["exclude"] = args.exclude or ()
    if args.output is not None:
        with WorkDisplay(accelerator.is_main_process, Console(stderr=True)):
            summary = recommend_file(recommender, args.input, args.output, args.part_users, **options)
        if accelerator.is_main_process:
            print(json.dumps(summary))
        accelerator.end_training()
        return
    results = recommender.recommend(users, **options)
    if args.format == "table":
        show(results, Console())
    elif args.format == "csv":
        rows = [
            (str(number) if result.user_id is None else result.user_id, item.item_id, item.score, rank)
            for number, result in enumerate(results)
            for rank, item in enumerate(result.items, start=1)
        ]
        columns = {"user_id": pl.String, "item_id": pl.String, "score": pl.Float64, "rank": pl.Int64}
        put(pl.DataFrame(rows, schema=columns, orient="row").write_csv())
    else:
        for result in results:
            put(json.dumps(result.to_dict(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
