"""How a training run starts: what both recipes take, what is refused before anything is trained, the first line."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from r2ec_trl.bundle.format import check_output
from r2ec_trl.bundle.meta import META_FILE
from r2ec_trl.cli.dataset_choice import DataArguments
from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.cli.terminal import WorkDisplay, say, start_logging
from r2ec_trl.cli.threads import use_cores
from r2ec_trl.data.arrow import to_dataset
from r2ec_trl.data.schema import CARD
from r2ec_trl.data.stable_hash import share_points
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import first_rows
from r2ec_trl.files import explained
from r2ec_trl.policy.ranges import check_ranges
from r2ec_trl.training.checkpoints import LATEST, named_checkpoint
from r2ec_trl.training.health import HealthCallback


@dataclass
class RunArguments(DataArguments):
    """What a training recipe adds to the trainer's settings."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one (reference: 8)."}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Stop training after so many seconds, to compare at equal time."}
    )
    user_share: str = field(
        default="0:1",
        metadata={
            "help": "Train on this share of the users, told apart by a hash of their ids: a warm start on 0:0.5 "
            "leaves 0.5:1 unseen for RecPO."
        },
    )
    max_test_users: int | None = field(default=None, metadata={"help": "Test on the first so many users only."})
    report_before: bool = field(default=True, metadata={"help": "Also evaluate the start on the test split."})
    no_history_share: float = field(
        default=0.0,
        metadata={"help": "Share of the train rows that lose their purchases, for users who have none (ours; off)."},
    )
    shown_rollouts: int = field(
        default=2, metadata={"help": "Newest rollouts shown while training, and test users shown at the end."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        share_ends(self.user_share)


class TimeLimitCallback(TrainerCallback, ExportableState):
    """
    Ends training at the first step after `seconds`, evaluation and saving included: on all processes together, when
    the first of them finds that the time is up. Saved with checkpoints, so that more seconds go on with such a run.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= any(gather_object([time.perf_counter() - self.start > self.seconds]))

    def state(self) -> dict[str, Any]:
        """What transformers writes into `trainer_state.json`."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}


@contextmanager
def started(run_args: RunArguments, args: Any, policy_args: Any) -> Iterator[None]:
    """
    A training run from its first line on: warnings and long work are shown by the main process alone, and what would
    only fail when all the training is done is refused.

    Raises:
        [`UserError`]: when the output folder cannot be written, is something else, or its `bundle` is; when there is
        no such checkpoint to go on from.
    """
    main = args.process_index == 0
    start_logging(main)
    threads = use_cores()
    _check_place(Path(args.output_dir), policy_args)
    folder = check_writable(args.output_dir)
    if args.resume_from_checkpoint not in (None, "", LATEST):
        named_checkpoint(args.resume_from_checkpoint)
    check_output(folder / "bundle")
    if run_args.early_stopping_patience is not None and args.eval_strategy == "no":
        raise UserError("--early_stopping_patience counts evaluations and there are none; add --eval_strategy steps.")
    if main:
        first = "the start is evaluated on the test split, then it trains" if run_args.report_before else "it trains"
        say(f"Reading {run_args.dataset} and {policy_args.model_name_or_path}; first {first}. Output: {folder}")
        if threads is not None:
            say(f"No GPU: {threads} CPU thread(s) a process; OMP_NUM_THREADS sets another number.")
    with WorkDisplay(shown=main):
        yield


def _check_place(folder: Path, policy_args: Any) -> None:
    """[`UserError`] for a folder whose own files the run would write over."""
    what = "a bundle" if (folder / META_FILE).is_file() else "a dataset folder" if (folder / CARD).is_file() else None
    for name in ("model_name_or_path", "adapter"):
        start = getattr(policy_args, name)
        what = f"the run's own --{name}" if start and folder.resolve() == Path(start).resolve() else what
    if what:
        raise UserError(f"--output_dir {folder} is {what}, which the run would write over; give another folder.")


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """The folder of the results, made if it is not there; [`UserError`] where nothing can be written into it."""
    with explained(folder):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)):
            return Path(folder)


def rows_to_test(run_args: RunArguments, args: Any, dataset: DatasetDict) -> Dataset:
    """The test rows of a run; [`UserError`] where a split that it will need is empty."""
    needed = ["test", "validation"] if args.eval_strategy != "no" else ["test"]
    for split in needed:
        if not len(dataset[split]):
            raise UserError(f"The {split} split of {run_args.dataset} has no rows; prepare the data with some.")
    return first_rows(dataset["test"], run_args.max_test_users)


def share_ends(share: str) -> tuple[float, float]:
    """
    The ends of `user_share`; [`UserError`] where it is none.

    >>> share_ends("0:0.5")
    (0.0, 0.5)
    """
    try:
        low, high = map(float, share.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"`user_share` is {share!r}; give two numbers between 0 and 1, as in 0:0.5.")
    return low, high


def shared_users(run_args: RunArguments, train: Dataset) -> Dataset:
    """The rows of the users in `user_share`; said where it is not all of them."""
    low, high = share_ends(run_args.user_share)
    if (low, high) == (0.0, 1.0):
        return train
    users = pl.Series(train["user_id"][:])
    points = share_points(users)
    inside = np.flatnonzero((points >= low) & (points < high))
    if not len(inside):
        raise UserError(f"--user_share {run_args.user_share} leaves no train row; give a larger share.")
    if PartialState().is_main_process:
        shared = f"{users.gather(inside).n_unique()} of {users.n_unique()} users ({run_args.user_share})"
        say(f"Training on {len(inside)} of {len(train)} rows: {shared}.")
    return train.select(inside)


def rows_to_train(run_args: RunArguments, args: Any, dataset: DatasetDict) -> Dataset:
    """The train rows of `user_share`; `no_history_share` of them, drawn by the run's seed, without their purchases."""
    train = shared_users(run_args, dataset["train"])
    if not run_args.no_history_share:
        return train
    frame = train.to_polars()
    drawn = np.random.default_rng(args.seed).permutation(frame.height) < run_args.no_history_share * frame.height
    emptied = [
        pl.when(pl.Series(drawn)).then(pl.lit([], dtype=kind)).otherwise(pl.col(name)).alias(name)
        for name, kind in frame.schema.items()
        if name.startswith("history")
    ]
    return to_dataset(frame.with_columns(emptied))


def callbacks_of(run_args: RunArguments) -> list[TrainerCallback]:
    """Health warnings, the learning curve, and what ends a run early."""
    callbacks = [HealthCallback(), LearningCurveCallback()]
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run_args.early_stopping_patience))
    if run_args.max_seconds is not None:
        callbacks.append(TimeLimitCallback(run_args.max_seconds))
    return callbacks
