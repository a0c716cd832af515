"""
Evaluate a bundle, or a model or adapter, on a dataset folder: greedy reasoning, then the whole catalogue.

    accelerate launch recipes/evaluate.py --bundle outputs/demo/bundle --dataset outputs/demo/demo_dataset
    accelerate launch recipes/evaluate.py --dataset DATASET_FOLDER --model_name_or_path MODEL --adapter ADAPTER
    accelerate launch recipes/evaluate.py ... --reasoning full none truncated other     # does the reasoning help?
    python recipes/evaluate.py ... --engine vllm                                      # reasonings at vLLM's speed

Prints Hit / NDCG / MRR @5/10/20 with and without the history mask and 95 % bootstrap intervals, popularity and
item-to-item counts beside them; the same by cold targets, length of the history and popularity of the target, and for
users whose purchases are all left out; coverage, Gini and popularity of what is recommended. Writes `metrics.json` and
`ranks.parquet` with the protocol inside, one folder a reasoning mode. `recipes/compare.py` compares such folders user
by user. Several processes share out the users. Hardware: whatever the model runs on; the demo's 500 users take seconds
on a CPU.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.cli.bundle_choice import BundleArguments, engine_of, load_bundle, make_bundle
from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.run_end import write_evaluation
from r2ec_trl.cli.run_start import check_writable, first_rows
from r2ec_trl.cli.terminal import WorkDisplay, say, start_logging
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import protocol
from r2ec_trl.evaluation.users import REASONING_MODES, alter_reasoning, gather_rows, own_rows, without_histories
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
        metadata={"help": f"One or more of {', '.join(REASONING_MODES)}; by default the bundle's own, or full."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of whose reasoning is swapped."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.reasoning:
            if mode not in REASONING_MODES:
                raise UserError(f"`reasoning` is {mode!r}; give one or more of {', '.join(REASONING_MODES)}.")


def reasonings(args: EvaluateArguments, bundle: Bundle, users: Dataset, accelerator: Accelerator) -> list[Rollout]:
    """Greedy reasonings of all users, by the engine that is named; each process writes those of its own."""
    prompt_ids = [bundle.prompts.user_ids(user) for user in own_rows(users, accelerator)]
    reasoner = bundle.reasoner(engine_of(args, bundle))
    with bundle.precision():
        mine = reasoner(prompt_ids, bundle.meta.protocol.max_completion_length)
    every: list[list[Rollout]] = gather_object([mine])
    return [every[row % len(every)][row // len(every)] for row in range(len(users))]


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
    users = first_rows(dataset[args.split], args.max_eval_users)
    if not len(users):
        raise UserError(f"--split {args.split} of {args.dataset} gives no rows; choose another, or more users.")
    bundle = load_bundle(args, policy_args) if args.bundle else make_bundle(args, policy_args, dataset, card)
    if args.bundle and bundle.meta.hashes["catalogue"] != card["sha256"]["items"]:
        dataset["items"], card = bundle.items, card_of_changed_catalogue(card, bundle)
    reader = MarkerReader(bundle.tokenizer, bundle.prompts.config.marker)
    modes = args.reasoning or [bundle.meta.protocol.reasoning]
    with torch.no_grad():
        known = [] if set(modes) == {"none"} else reasonings(args, bundle, users, accelerator)
    for mode in modes:
        rollouts = alter_reasoning(known or [reader.finish([], end_ids=[])] * len(users), reader, mode, args.seed)
        own = rollouts[accelerator.process_index :: accelerator.num_processes] or rollouts[:1]
        frame = gather_rows(bundle.evaluate(own_rows(users, accelerator), "full", own), len(users))
        if accelerator.is_main_process:
            folder = Path(args.output_dir) if len(modes) == 1 else Path(args.output_dir) / mode
            names = {"bundle": args.bundle, "adapter": policy_args.adapter, "engine": args.engine}
            facts = protocol(card, {**bundle.settings(), **names, "reasoning": mode}, args.seed, args.split)
            alone = bundle.evaluate(without_histories(users), mode) if mode in ("full", "none") else None
            write_evaluation(folder, frame, dataset, card, users, facts, alone)


if __name__ == "__main__":
    run(main)
