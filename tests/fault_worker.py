"""
A training run that goes wrong on purpose; tests/test_faults.py launches it on one or two processes.

    torchrun --nproc_per_node 2 tests/fault_worker.py CASE.json

CASE.json is a case of tests/distributed_worker.py with `fault`: what happens in the third step, and on which process:
"memory", "hang" and "loss" on the last one, "disk" on the first, "wait" on all.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from distributed_worker import build_trainer
from transformers import TrainerCallback

from r2ec_trl.cli.parsing import run
from r2ec_trl.training.recpo_trainer import RecPOTrainer

STEP = 2  # of which two were taken


class FaultyTrainer(RecPOTrainer):
    """Fails where it is told to."""

    fault = ""

    def _is_due(self, first: bool) -> bool:
        process_index = 0 if first else self.accelerator.num_processes - 1
        due = self.state.global_step == STEP and self.accelerator.process_index == process_index
        if due:
            print("going wrong", flush=True)
        return due

    def roll_out(self, prompts, trainer=None):
        if self.fault == "hang" and self._is_due(first=False):
            time.sleep(3600)
        if self.fault == "wait" and self.state.global_step == STEP:
            (Path(self.args.output_dir) / f"waiting{self.accelerator.process_index}").touch()
            time.sleep(5)
        if self.fault == "disk" and self._is_due(first=True):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # from now on no file grows beyond 20 kB
        return super().roll_out(prompts)

    def _compute_loss(self, model, inputs):
        if self.fault == "loss" and self._is_due(first=False):
            inputs = {**inputs, "advantages": inputs["advantages"] * torch.nan}
        loss = super()._compute_loss(model, inputs)
        if self.fault == "memory" and self._is_due(first=False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


def main() -> None:
    torch.set_num_threads(1)
    case = json.loads(Path(sys.argv[1]).read_text())
    trainer = build_trainer(case, TrainerCallback(), FaultyTrainer)
    trainer.fault = case["fault"]
    trainer.train(resume_from_checkpoint=case.get("resume"))
    print(f"finished at step {trainer.state.global_step}", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run(main)
