"""
Contrastive training (M8): the warm start of RecPO, and the baseline it must beat. Without reasoning, or aligned:
`--reasoning sampled` also takes answer states after the policy's own sampled reasoning.

    accelerate launch recipes/contrastive.py --config recipes/configs/smollm2_contrastive.yaml --dataset DATASET_FOLDER

Writes into `--output_dir`: the adapter (or weights), `bundle` (what recipes/recommend.py takes), `metrics.json`
(`before` and `after` on the test split, both without reasoning unless it is sampled, when validation full and
none is there too), `ranks.parquet` and `before/ranks.parquet`. Only
validation is seen while training.
Hardware, run time and measured results of each config: recipes/README.md.
"""

from r2ec_trl.cli.dataset_choice import load_dataset
from r2ec_trl.cli.parsing import parse, run
from r2ec_trl.cli.run_end import train_and_finish
from r2ec_trl.cli.run_start import RunArguments, callbacks_of, rows_to_test, rows_to_train, started
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig, ContrastiveTrainer


def main() -> None:
    run_args, args, policy_args = parse((RunArguments, ContrastiveConfig, PolicyArguments), description=__doc__)
    with started(run_args, args, policy_args):
        dataset, card = load_dataset(run_args.dataset, args.output_dir)
        test = rows_to_test(run_args, args, dataset)
        args.category = args.category or card["category"]
        model, tokenizer = load_policy(policy_args, trainable=True, trust_remote_code=args.trust_remote_code)
        trainer = ContrastiveTrainer(
            model,
            dataset["items"],
            args,
            rows_to_train(run_args, args, dataset),
            dataset["validation"],
            tokenizer,
            peft_config=peft_config(policy_args),
            callbacks=callbacks_of(run_args),
        )
        train_and_finish(trainer, dataset, card, test, run_args)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
