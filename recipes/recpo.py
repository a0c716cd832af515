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

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

from r2ec_trl.cli.dataset_choice import DataArguments, load_dataset
from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.cli.live import RecPOProgressCallback
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.plan import make_plan
from r2ec_trl.cli.run_end import finish_run, first_rows, start_logging
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.training.health import HealthCallback
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.recpo_trainer import RecPOTrainer

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


@dataclass
class RecPOScriptArguments(DataArguments):
    """What this recipe adds to the trainer's settings."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["fused"],
        metadata={
            "help": "Rewards: fused, ndcg, hit, reciprocal_rank, target_probability, file.py:func, module:func."
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one (reference: 8)."}
    )
    max_test_users: int | None = field(default=None, metadata={"help": "Test on the first so many users only."})
    report_before: bool = field(default=True, metadata={"help": "Also evaluate the start on the test split."})
    plan: bool = field(default=False, metadata={"help": "Print parameters, memory, steps and problems, then stop."})


def main() -> None:
    script_args, args, policy_args = parse(
        (RecPOScriptArguments, RecPOConfig, PolicyArguments), description=__doc__, default_config=DEMO_CONFIG
    )
    start_logging(args)
    dataset, card = load_dataset(script_args.dataset, args.output_dir)
    args.category = args.category or card["category"]
    if script_args.plan:
        if args.process_index == 0:
            Console().print(make_plan(args, policy_args, dataset).render())
        return
    model, tokenizer = load_policy(policy_args, trainable=True, trust_remote_code=args.trust_remote_code)
    callbacks = [HealthCallback(), LearningCurveCallback()]
    if script_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(script_args.early_stopping_patience))
    trainer = RecPOTrainer(
        model,
        dataset["items"],
        script_args.reward_funcs,
        args,
        dataset["train"],
        dataset["validation"],
        tokenizer,
        peft_config=peft_config(policy_args),
        callbacks=callbacks,
    )
    for plain in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(plain)
    trainer.add_callback(RecPOProgressCallback(lambda: trainer.last_rollout_example))
    test = first_rows(dataset["test"], script_args.max_test_users)
    before = trainer.evaluate_frame(test) if script_args.report_before else None  # looked at when training is over
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finish_run(trainer, dataset, card, test, before)
    if trainer.use_vllm:
        trainer.vllm_generation.close()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
