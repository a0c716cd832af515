"""
Try rewards before training with them: sample rollouts once, keep them, score them under any callables in seconds.

    python recipes/try_reward.py --bundle outputs/demo/bundle --dataset outputs/demo/demo_dataset \
        --rollouts outputs/rollouts.parquet --reward_funcs fused ndcg
    python recipes/try_reward.py --rollouts outputs/rollouts.parquet --reward_funcs fused my_rewards.py:top3

The first call samples G reasonings of n validation users with the bundle (or `--model_name_or_path`, `--adapter`) and
writes them with ranks and probabilities; the next ones read the file and need no model. Prints for each reward its
spread within groups, the share of groups that carry no signal, its correlation with the paper's reward and with the
rank, and the rollouts that it would push up and down. Hardware: whatever the model runs on; any for the file.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import polars as pl
from accelerate import PartialState
from rich import get_console

from r2ec_trl.cli.bundle_choice import BundleArguments, bundle_and_rows
from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.reward_trial import examples, trial_table
from r2ec_trl.cli.run_start import check_writable
from r2ec_trl.cli.terminal import WorkDisplay, say, start_logging
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import protocol, write_frame
from r2ec_trl.evaluation.reward_trial import read_rollouts, rollout_rows, try_rewards
from r2ec_trl.evaluation.sampling import sample_users
from r2ec_trl.files import finite, write_json
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.rewards import Reward, load_reward


@dataclass
class TrialArguments(BundleArguments):
    """Which rollouts, and which rewards."""

    rollouts: str = field(
        default="outputs/rollouts.parquet", metadata={"help": "File of rollouts: read if it is there, else written."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["fused"],
        metadata={"help": "Rewards: built-ins, path/to/file.py:function or package.module:function."},
    )
    reward_mix: float = field(default=0.05, metadata={"help": "β of the fused reward (M3)."})
    reward_cutoff: int = field(default=1000, metadata={"help": "k of the rank rewards (M1)."})
    soft_punish_cache: int = field(
        default=16, metadata={"help": "Tokens before --max_completion_length over which soft_overlong falls to -1."}
    )
    split: str = field(
        default="validation", metadata={"help": "Split of the users.", "choices": ["train", "validation", "test"]}
    )
    max_eval_users: int | None = field(default=64, metadata={"help": "First rows of the split that are sampled."})
    num_generations: int = field(default=8, metadata={"help": "G, rollouts a user."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; give it as training does."})
    top_k: int = field(default=0, metadata={"help": "Of the sampling, as in training; 0: the whole vocabulary."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    output: str | None = field(default=None, metadata={"help": "Also write the figures to this JSON file."})


def sampled(args: TrialArguments, policy_args: PolicyArguments) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Rollouts of the named recommender, kept in the file."""
    if args.engine == "vllm":
        raise UserError("--engine vllm writes greedy reasonings; leave it out: rollouts are sampled by transformers.")
    if PartialState().num_processes > 1:
        raise UserError("try_reward.py samples in one process; launch it with `python`.")
    check_writable(Path(args.rollouts).parent)
    dataset, card = load_dataset(args.dataset, Path(args.rollouts).parent)
    bundle, users = bundle_and_rows(args, policy_args, dataset, card)
    limits = bundle.meta.protocol
    with bundle.precision():
        samples, _ = sample_users(
            bundle.model,
            bundle.prompts,
            bundle.table,
            users,
            args.num_generations,
            limits.max_completion_length,
            limits.item_temperature,
            limits.forward_token_budget,
            args.temperature,
            args.top_k,
            args.seed,
        )
    rollouts = rollout_rows(samples, users, bundle.prompts, len(bundle.table))
    names = {"bundle": args.bundle, "adapter": policy_args.adapter}
    names |= {"temperature": args.temperature, "top_k": args.top_k}
    facts = protocol(
        card, {**bundle.settings(), **names, "num_generations": args.num_generations}, args.seed, args.split
    )
    write_frame(args.rollouts, rollouts, facts)
    return rollouts, facts


def named_rewards(args: TrialArguments, max_completion_length: int) -> dict[str, Reward]:
    """The rewards that are named, with the settings that built-ins take."""
    settings = {name: getattr(args, name) for name in ("reward_mix", "reward_cutoff", "soft_punish_cache")}
    settings["max_completion_length"] = max_completion_length
    return {spec: load_reward(spec, **settings) for spec in args.reward_funcs}


def unread_flags(args: TrialArguments, policy_args: PolicyArguments) -> list[str]:
    """What was asked for and matters only where rollouts are sampled."""
    read = {"rollouts", "reward_funcs", "reward_mix", "reward_cutoff", "soft_punish_cache", "output"}
    pairs = ((args, TrialArguments()), (policy_args, PolicyArguments()))
    names = [(given, usual, one.name) for given, usual in pairs for one in fields(given) if one.name not in read]
    return [name for given, usual, name in names if getattr(given, name) != getattr(usual, name)]


def main() -> None:
    args, policy_args = parse((TrialArguments, PolicyArguments), description=__doc__)
    start_logging()
    named_rewards(args, args.max_completion_length)  # what cannot be loaded is said before anything is sampled
    if args.output is not None:
        check_writable(Path(args.output).parent)
    there, named = Path(args.rollouts).exists(), args.bundle or policy_args.model_name_or_path
    if there and named:
        raise UserError(f"{args.rollouts} is there already; leave {named!r} out to read it, or name another file.")
    if there and (given := unread_flags(args, policy_args)):
        raise UserError(
            f"{args.rollouts} is there already, so --{given[0]} decides nothing; leave it out, or name another file."
        )
    if not there and not named:
        raise UserError(f"{args.rollouts} is not there; name a --bundle (or --model_name_or_path) to sample with.")
    with WorkDisplay():
        rollouts, facts = read_rollouts(args.rollouts) if there else sampled(args, policy_args)
        say(f"{rollouts['row'].n_unique():,} users, {rollouts.height:,} rollouts of {args.rollouts}.")
        found = try_rewards(rollouts, named_rewards(args, facts["settings"]["max_completion_length"]))
    console = get_console()
    console.print(trial_table(found))
    for name, one in found.items():
        console.print(examples(name, one))
    if args.output is not None:
        write_json(args.output, finite({"protocol": facts, "rewards": found}))


if __name__ == "__main__":
    run(main)
