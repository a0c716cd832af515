"""
Evaluate a bundle, or a model or adapter, on a dataset folder: greedy reasoning, then the whole catalogue.

    accelerate launch recipes/evaluate.py --bundle outputs/demo/bundle --dataset outputs/demo/demo_dataset
    accelerate launch recipes/evaluate.py --dataset DATASET_FOLDER --model_name_or_path MODEL --adapter ADAPTER
    accelerate launch recipes/evaluate.py ... --reasoning full none first:8 other best:8
    accelerate launch recipes/evaluate.py ... --audit true                             # does the reasoning help?
    python recipes/evaluate.py ... --engine vllm                                      # reasonings at vLLM's speed

Prints Hit / NDCG / MRR @5/10/20 with and without the history mask and 95 % bootstrap intervals, popularity and
item-to-item counts beside them; the same by cold targets, length of the history and popularity of the target, and for
users whose purchases are all left out; coverage, Gini and popularity of what is recommended. Writes `metrics.json` and
`ranks.parquet` with the protocol inside, one folder a reasoning mode; with `--audit` one table over the modes,
`reasoning_audit.json` and a picture of NDCG@10 against tokens. `recipes/compare.py` compares such folders user
by user. Several processes share out the users. Hardware: whatever the model runs on; the demo's 500 users take seconds
on a CPU.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from rich import get_console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.meta import read_json
from r2ec_trl.cli.bundle_choice import BundleArguments, bundle_and_rows, engine_of
from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.reasoning_audit import audit_table, draw_audit
from r2ec_trl.cli.run_end import write_evaluation
from r2ec_trl.cli.run_start import check_writable
from r2ec_trl.cli.terminal import WorkDisplay, say, start_logging
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import check_rows, differences
from r2ec_trl.evaluation.reasoning_audit import COUNTED_MODES, audit_modes, audit_reasoning, split_mode
from r2ec_trl.evaluation.report import MASKS, METRICS_FILE, protocol, read_ranks
from r2ec_trl.evaluation.sampling import most_likely, sample_users
from r2ec_trl.evaluation.users import REASONING_MODES, alter_reasoning, gather_rows, own_rows, without_histories
from r2ec_trl.files import finite, write_json, write_with
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.policy.rollouts import MarkerReader, Rollout


@dataclass
class EvaluateArguments(BundleArguments):
    """What is evaluated, and how."""

    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    split: str = field(
        default="test", metadata={"help": "Split to evaluate.", "choices": ["train", "validation", "test"]}
    )
    reasoning: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"One or more of {', '.join(REASONING_MODES)}, first:N ({COUNTED_MODES['first']}), best:N "
            f"({COUNTED_MODES['best']}); by default the bundle's own, or full."
        },
    )
    audit: bool = field(
        default=False,
        metadata={"help": "One table and picture over all modes: those of --reasoning, or a sweep of lengths."},
    )
    beside: list[str] = field(
        default_factory=list, metadata={"help": "Folders of other evaluations of the same rows, shown in the audit."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the bootstrap, of whose reasoning is swapped and of sampling (best:N)."}
    )
    record: bool = field(
        default=False,
        metadata={
            "help": "Keep the test figures of full and none in the bundle: servers quote what no reasoning costs."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.reasoning:
            split_mode(mode)
        if self.beside and not self.audit:
            raise UserError("--beside is shown in the audit; add --audit true, or use recipes/compare.py.")
        if self.record and (self.bundle is None or self.split != "test" or self.max_eval_users is not None):
            raise UserError("--record keeps figures of all test users with a --bundle; leave --split and a cut out.")
        if self.record and self.reasoning and not {"full", "none"} & set(self.reasoning):
            raise UserError("--record keeps figures of full and none; add one of them to --reasoning or leave it out.")


class Modes:
    """
    Ranks under each way to reason, and the seconds a user that they take. A greedy reasoning is written once for all
    modes that use it.
    """

    def __init__(self, args: EvaluateArguments, bundle: Bundle, users: Dataset, accelerator: Accelerator):
        self.bundle, self.users, self.accelerator, self.seed = bundle, users, accelerator, args.seed
        self.mine = own_rows(users, accelerator)
        self.reader = MarkerReader(bundle.tokenizer, bundle.prompts.config.marker)
        self.reasoner = bundle.reasoner(engine_of(args, bundle))
        self.written: dict[int, tuple[list[Rollout], float]] = {}  # by length limit
        self.samples: dict[str, pl.DataFrame] = {}

    def greedy(self, limit: int) -> tuple[list[Rollout], float]:
        """Greedy reasonings of all users, each process's own gathered, and the seconds they took."""
        if limit not in self.written:
            start = time.perf_counter()
            prompt_ids = [self.bundle.prompts.user_ids(user) for user in self.mine]
            with torch.no_grad(), self.bundle.precision():
                mine = self.reasoner(prompt_ids, limit)
            every: list[list[Rollout]] = gather_object([mine])
            rollouts = [every[row % len(every)][row // len(every)] for row in range(len(self.users))]
            self.written[limit] = rollouts, time.perf_counter() - start
        return self.written[limit]

    def __call__(self, mode: str) -> tuple[pl.DataFrame, float]:
        """One row a user in order, and seconds a user."""
        name, number = split_mode(mode)
        before, start, count = 0.0, time.perf_counter(), len(self.users)
        if name == "best":
            frame = self._best(mode, number)
        else:
            limit = self.bundle.meta.protocol.max_completion_length
            rollouts = [self.reader.finish([], end_ids=[])] * count
            if name != "none":
                rollouts, before = self.greedy(min(number or limit, limit))
                start = time.perf_counter()
            rollouts = alter_reasoning(rollouts, self.reader, "full" if name == "first" else name, self.seed)
            own = rollouts[self.accelerator.process_index :: self.accelerator.num_processes] or rollouts[:1]
            frame = gather_rows(self.bundle.evaluate(self.mine, "full", own), count)
        return frame, (before + time.perf_counter() - start) / count

    def _best(self, mode: str, number: int) -> pl.DataFrame:
        protocol, parts = self.bundle.meta.protocol, (self.bundle.model, self.bundle.prompts, self.bundle.table)
        with self.bundle.precision():
            frame, _ = sample_users(
                *parts,
                self.mine,
                number,
                protocol.max_completion_length,
                protocol.item_temperature,
                protocol.forward_token_budget,
                seed=self.seed + self.accelerator.process_index,
            )
        ranks = frame.group_by("row", maintain_order=True).agg(*MASKS.values(), pl.col("reasoning_tokens").sum())
        self.samples[mode] = gather_rows(ranks, len(self.users))
        return gather_rows(frame[most_likely(frame)].drop("row", "completion_ids"), len(self.users))


def card_of_changed_catalogue(card: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    """The card of users who are ranked in a catalogue changed since; the demo's generator knows nothing of it."""
    counts = {**card["counts"], "items": len(bundle.items)}
    hashes = {**card["sha256"], "items": bundle.meta.hashes["catalogue"]}
    return {**card, "counts": counts, "sha256": hashes, "synthetic": False}


def main() -> None:
    args, policy_args = parse((EvaluateArguments, PolicyArguments), description=__doc__)
    accelerator = Accelerator()
    start_logging(accelerator.is_main_process)
    check_writable(args.output_dir)
    if accelerator.is_main_process:
        say(f"Reading {args.dataset} and {args.bundle or policy_args.adapter or policy_args.model_name_or_path}.")
    with WorkDisplay(shown=accelerator.is_main_process):
        evaluate(args, policy_args, accelerator)


def evaluate(args: EvaluateArguments, policy_args: PolicyArguments, accelerator: Accelerator) -> None:
    """Every mode of reasoning on the users of the split, a report each."""
    unset_hf_deepspeed_config()  # a ZeRO-3 launch would share out the weights as they are loaded
    if args.engine == "vllm" and accelerator.num_processes > 1:
        raise UserError("--engine vllm evaluates in one process; launch with `python`, or leave it out.")
    dataset, card = load_dataset(args.dataset, args.output_dir)
    bundle, users = bundle_and_rows(args, policy_args, dataset, card)
    if args.bundle and bundle.meta.hashes["catalogue"] != card["sha256"]["items"]:
        if args.record:
            raise UserError(f"The catalogue of {args.bundle} is not {args.dataset}'s; evaluate without --record.")
        dataset["items"], card = bundle.items, card_of_changed_catalogue(card, bundle)
    if args.record:
        if bundle.folder is None:
            raise UserError(f"--record writes into a local bundle, and {args.bundle} is the hub's; download it first.")
        check_writable(bundle.folder)
    wanted = args.reasoning or ([] if not args.audit else audit_modes(bundle.meta.protocol.max_completion_length))
    wanted = wanted or [bundle.meta.protocol.reasoning]
    names = {"bundle": args.bundle, "adapter": policy_args.adapter, "engine": args.engine}
    settings = {**bundle.settings(), **names}
    facts = protocol(card, settings, args.seed, args.split)
    beside: dict[str, pl.DataFrame] = {}
    for folder in args.beside:
        path = Path(folder).resolve()
        name = str(path) if path.name in {*REASONING_MODES, *wanted, *beside} else path.name
        beside[name] = _beside(folder, facts, users)
    place = Path(args.output_dir)
    places = {mode: place / mode.replace(":", "_") if len(wanted) > 1 else place for mode in wanted}
    _keep_training_runs(places.values())
    modes, frames, seconds = Modes(args, bundle, users, accelerator), {}, {}
    for mode in wanted:
        frame, seconds[mode] = modes(mode)
        frames[mode] = frame
        if accelerator.is_main_process:
            own = {**facts, "settings": {**facts["settings"], "reasoning": mode}}
            alone = bundle.evaluate(without_histories(users), mode) if mode in ("full", "none") else None
            result = write_evaluation(places[mode], frame, dataset, card, users, own, alone)
            if args.record and mode in ("full", "none"):
                name = "after" if mode == bundle.meta.protocol.reasoning else f"reasoning_{mode}"
                bundle.record_metrics({name: result})
    if args.audit and accelerator.is_main_process:
        found = audit_reasoning(frames, seconds, modes.samples, beside, args.seed)
        write_json(Path(args.output_dir) / "reasoning_audit.json", finite({"protocol": facts, "modes": found}))
        for mask in MASKS:
            get_console().print(audit_table(found, mask))
        picture = draw_audit(found)
        write_with(
            Path(args.output_dir) / "reasoning_audit.png", lambda path: picture.savefig(path, dpi=110, format="png")
        )


def _keep_training_runs(folders: Iterable[Path]) -> None:
    """[`UserError`] for the folder of a training run, whose figures an evaluation would replace."""
    for folder in folders:
        file = folder / METRICS_FILE
        if file.is_file() and "training" in read_json(file):
            raise UserError(
                f"{file} is of a training run; give another --output_dir, such as {folder / 'evaluation'}."
            )


def _beside(folder: str, facts: dict[str, Any], users: Dataset) -> pl.DataFrame:
    """The ranks of another evaluation; [`UserError`] where it is not of these rows."""
    frame, theirs = read_ranks(folder)
    names = f"--beside {folder} and these rows"
    differences(facts, theirs, names)
    check_rows(pl.DataFrame({name: users[name][:] for name in ("user_id", "target")}), frame, names)
    return frame


if __name__ == "__main__":
    run(main)
