"""
Training runs from replayed rollouts, on as many processes as the launcher starts; tests/test_distributed.py launches
it and compares what it writes.

    torchrun --nproc_per_node 2 tests/distributed_worker.py CASES.json
    accelerate launch --config_file accelerate_configs/zero2.yaml tests/distributed_worker.py CASES.json

CASES.json is a list of runs: `trainer` ("recpo" or "contrastive"), `settings` (of its config), `model` and `dataset`
(folders), `adapter` (folder or null), `train_rows`, `evaluate`, `resume` and `output` (the file to write).
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback
from trl import GRPOTrainer

from r2ec_trl.data.schema import load_dataset_folder
from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig, ContrastiveTrainer
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.recpo_trainer import RecPOTrainer


def scripted_rollout(reader, eos_token_id, vocab_size, prompt_ids, number):
    """A rollout that depends on prompt and number alone: it writes the marker, stops without it, or never ends."""
    draw = random.Random(f"{prompt_ids}-{number}")
    words = [draw.randrange(10, vocab_size) for _ in range(draw.randrange(1, 8))]
    ending = ([*reader.marker_ids, 11, 12], [eos_token_id], [])[number % 3]
    return words + ending


def replay_rollouts(num_generations):
    """Make TRL's sampler hand out `scripted_rollout`s: the n-th row of the generation batch is rollout n mod G."""

    def generate(self, prompt_ids, *args, **kwargs):
        start = self.accelerator.process_index * len(prompt_ids)
        ids = [
            scripted_rollout(
                self.reader,
                self._tokenizer.eos_token_id,
                len(self._tokenizer),
                prompt,
                (start + row) % num_generations,
            )
            for row, prompt in enumerate(prompt_ids)
        ]
        return ids, None

    GRPOTrainer._generate_single_turn = generate


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that each optimizer step sees, averaged over processes and whole under every ZeRO stage."""

    def __init__(self):
        self.trainer = None
        self.gradients = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.model_wrapped
            step = engine.step

            def recording_step(*args, **kwargs):
                self.record()
                return step(*args, **kwargs)

            engine.step = recording_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.record()

    def record(self):
        parameters = [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        if self.trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_grad

            gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters}
        else:
            gradients = {name: parameter.grad for name, parameter in parameters}
        self.gradients.append(
            {name: torch.zeros(()) if value is None else value.detach().clone() for name, value in gradients.items()}
        )


def whole_parameters(trainer):
    """Name → value of every trained parameter, gathered under ZeRO-3."""
    values = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().clone()
        else:
            values[name] = parameter.detach().clone()
    return values


def build_trainer(case, recorder, trainer_class=RecPOTrainer):
    """The case's trainer, its rollouts replayed."""
    dataset = load_dataset_folder(case["dataset"])
    config_class = RecPOConfig if case["trainer"] == "recpo" else ContrastiveConfig
    args = config_class(**case["settings"])
    policy = PolicyArguments(model_name_or_path=case["model"], adapter=case["adapter"], dtype="float32")
    model, tokenizer = load_policy(policy, trainable=True)
    train = dataset["train"].select(case["train_rows"])
    if case["trainer"] == "recpo":
        replay_rollouts(args.num_generations)
        return trainer_class(
            model, dataset["items"], None, args, train, dataset["validation"], tokenizer, callbacks=[recorder]
        )
    return ContrastiveTrainer(
        model, dataset["items"], args, train, dataset["validation"], tokenizer, callbacks=[recorder]
    )


def run_case(case):
    """Train, and return what the tests compare."""
    recorder = GradientRecorder()
    trainer = recorder.trainer = build_trainer(case, recorder)
    losses = []
    training_step = trainer.training_step

    def recording_training_step(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recording_training_step
    trainer.train(resume_from_checkpoint=case.get("resume"))
    accumulation = trainer.args.gradient_accumulation_steps
    steps = torch.tensor(losses).view(-1, accumulation).sum(1)  # micro-batches are normalised already
    evaluation = trainer.evaluate_frame(trainer.eval_dataset.select(range(5))) if case["evaluate"] else None
    engine = trainer.model_wrapped
    return {
        "loss": trainer.accelerator.gather(steps[None]).mean(0),
        "gradients": recorder.gradients,
        "parameters": whole_parameters(trainer),
        "table": trainer.table.take(range(len(trainer.table))),
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if trainer.is_deepspeed_enabled else None,
        "processes": trainer.accelerator.num_processes,
        "evaluation": evaluation,
        "logs": trainer.state.log_history,
    }


def main():
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        result = run_case(case)
        if PartialState().is_main_process:
            torch.save(result, case["output"])
        AcceleratorState._reset_state()  # the next run's batch sizes are other ones; the process group stays
        GradientState._reset_state()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down in order ("terminate called without ...")


if __name__ == "__main__":
    main()
