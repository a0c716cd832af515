"""
RecPO: train a policy to reason, then recommend.

    accelerate launch recipes/recpo.py                                # the demo: nothing to download
    accelerate launch recipes/recpo.py --config recipes/configs/gemma2_2b.yaml --dataset DATASET_FOLDER
    accelerate launch recipes/recpo.py --config X.yaml --dataset DATASET_FOLDER --adapter WARM_START \
        --reward_funcs my_rewards.py:my_reward
    accelerate launch recipes/recpo.py --config X.yaml --dataset DATASET_FOLDER --plan        # memory, problems
    accelerate launch recipes/recpo.py --config X.yaml ... --resume_from_checkpoint latest       # go on after a stop

Writes into `--output_dir`: the adapter (or weights), `bundle` (what recipes/recommend.py takes), `metrics.json`
(`before` and `after` on the test split), `ranks.parquet`, `before/ranks.parquet` and `learning_curve.png`. Only
validation is seen while training.
Hardware, run time and measured results of each config: recipes/README.md.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rich import get_console
from transformers import PrinterCallback, ProgressCallback

from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.live import RecPOProgressCallback
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.plan import make_plan
from r2ec_trl.cli.run_end import train_and_finish
from r2ec_trl.cli.run_start import RunArguments, callbacks_of, rows_to_test, rows_to_train, started
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.training.inputs import resolve_rewards
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.recpo_trainer import RecPOTrainer
from r2ec_trl.vllm.guards import unused_engine

logger = logging.getLogger(__name__)
DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


@dataclass
class RecPOScriptArguments(RunArguments):
    """What this recipe adds to the trainer's settings."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["fused"],
        metadata={
            "help": "Rewards: fused, ndcg, hit, reciprocal_rank, target_probability, length, soft_overlong, "
            "file.py:func, module:func; `reward_weights` says what each weighs."
        },
    )
    plan: bool = field(default=False, metadata={"help": "Print parameters, memory, steps and problems, then stop."})


def main() -> None:
    run_args, args, policy_args = parse(
        (RecPOScriptArguments, RecPOConfig, PolicyArguments), description=__doc__, default_config=DEMO_CONFIG
    )
    if run_args.plan:
        dataset, card = load_dataset(run_args.dataset, args.output_dir)
        args.category = args.category or card["category"]
        resolve_rewards(run_args.reward_funcs, args, dataset["train"].column_names)
        if args.process_index == 0:
            dataset["train"] = rows_to_train(run_args, args, dataset)
            get_console().print(make_plan(args, policy_args, dataset).render())
        return
    with started(run_args, args, policy_args):
        dataset, card = load_dataset(run_args.dataset, args.output_dir)
        test = rows_to_test(run_args, args, dataset)
        rewards = resolve_rewards(run_args.reward_funcs, args, dataset["train"].column_names)
        args.category = args.category or card["category"]
        if (unused := unused_engine(args)) and args.process_index == 0:
            logger.warning(unused)
        if args.gradient_checkpointing == "auto":
            make_plan(args, policy_args, dataset)
        model, tokenizer = load_policy(policy_args, trainable=True, trust_remote_code=args.trust_remote_code)
        trainer = RecPOTrainer(
            model,
            dataset["items"],
            rewards,
            args,
            rows_to_train(run_args, args, dataset),
            dataset["validation"],
            tokenizer,
            peft_config=peft_config(policy_args),
            callbacks=callbacks_of(run_args),
        )
        for plain in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(plain)
        trainer.add_callback(
            RecPOProgressCallback(lambda: trainer.last_rollout_example, shown=run_args.shown_rollouts)
        )
        train_and_finish(trainer, dataset, card, test, run_args)
        if trainer.use_vllm:
            trainer.vllm_generation.close()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
