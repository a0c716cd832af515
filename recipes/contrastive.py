"""
Contrastive training without reasoning (M8): the warm start of RecPO, and the baseline it must beat.

    accelerate launch recipes/contrastive.py --config recipes/configs/smollm2_contrastive.yaml --dataset DATASET_FOLDER

Writes into `--output_dir`: the adapter (or weights), `bundle` (what recipes/recommend.py takes), `metrics.json`
(`before` and `after` on the test split, both without reasoning), `ranks.parquet` and `before/ranks.parquet`. Only
validation is seen while training.
Hardware, run time and measured results of each config: recipes/README.md.
"""

import time
from dataclasses import dataclass, field

from transformers import EarlyStoppingCallback, TrainerCallback

from r2ec_trl.cli.dataset_choice import DataArguments, load_dataset
from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.run_end import finish_run, first_rows, start_logging
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig, ContrastiveTrainer
from r2ec_trl.training.health import HealthCallback


@dataclass
class ContrastiveScriptArguments(DataArguments):
    """What this recipe adds to the trainer's settings."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one."}
    )
    max_test_users: int | None = field(default=None, metadata={"help": "Test on the first so many users only."})
    report_before: bool = field(default=True, metadata={"help": "Also evaluate the start on the test split."})
    max_seconds: float | None = field(
        default=None, metadata={"help": "Stop training after so many seconds, to compare at equal time."}
    )


class TimeLimitCallback(TrainerCallback):
    """Ends training at the first step after `seconds`, evaluation and saving included."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() - self.start > self.seconds


def main() -> None:
    script_args, args, policy_args = parse(
        (ContrastiveScriptArguments, ContrastiveConfig, PolicyArguments), description=__doc__
    )
    start_logging(args)
    dataset, card = load_dataset(script_args.dataset, args.output_dir)
    args.category = args.category or card["category"]
    model, tokenizer = load_policy(policy_args, trainable=True, trust_remote_code=args.trust_remote_code)
    callbacks = [HealthCallback(), LearningCurveCallback()]
    if script_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(script_args.early_stopping_patience))
    if script_args.max_seconds is not None:
        callbacks.append(TimeLimitCallback(script_args.max_seconds))
    trainer = ContrastiveTrainer(
        model,
        dataset["items"],
        args,
        dataset["train"],
        dataset["validation"],
        tokenizer,
        peft_config=peft_config(policy_args),
        callbacks=callbacks,
    )
    test = first_rows(dataset["test"], script_args.max_test_users)
    before = trainer.evaluate_frame(test) if script_args.report_before else None  # looked at when training is over
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finish_run(trainer, dataset, card, test, before)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
