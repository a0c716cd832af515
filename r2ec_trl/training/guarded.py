"""What both trainers wire into transformers' loop: the guard around a run, and checkpoints that are whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2ec_trl.items.table import ItemTable
from r2ec_trl.training.checkpoints import CheckpointKeeper
from r2ec_trl.training.faults import RunGuard, SaveOnTerminate
from r2ec_trl.training.telemetry import Telemetry

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class GuardedTraining(_Base):
    """
    Mixin for a [`~transformers.Trainer`] with a `table` and a `telemetry`. What is overridden, and why:

    - `train`: runs inside the [`~r2ec_trl.training.faults.RunGuard`], from the checkpoint that was asked for.
    - `_prepare_inputs`: the guard keeps the micro-batch, as evidence.
    - `_get_grad_norm`: a gradient that is no number ends the run before it reaches the weights.
    - `_save_checkpoint`: the [`~r2ec_trl.training.checkpoints.CheckpointKeeper`] makes it whole.
    """

    table: ItemTable
    telemetry: Telemetry
    guard: RunGuard
    keeper: CheckpointKeeper

    def guard_training(self, telemetry: Telemetry) -> None:
        """Make the objects that a run needs; call it at the end of `__init__`."""
        self.telemetry = telemetry
        self.guard = RunGuard(telemetry, self.args, self.processing_class)
        self.keeper = CheckpointKeeper(self.table, self.accelerator, self.args)
        self.add_callback(telemetry)
        self.add_callback(self.keeper)

    def steps_taken(self) -> int:
        """Optimizer steps so far."""
        return self.state.global_step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        As [`~transformers.Trainer`]'s.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `"latest"` (or `True`): the newest whole one of `output_dir`, if any.
        """
        if not any(isinstance(callback, SaveOnTerminate) for callback in self.callback_handler.callbacks):
            self.add_callback(SaveOnTerminate(self.accelerator))
        with self.guard:
            folder = self.keeper.resume_from(resume_from_checkpoint)
            return super().train(None if folder is None else str(folder), *args, **kwargs)

    def _prepare_inputs(self, inputs):
        self.telemetry.come_to("train")
        self.guard.micro_batch = super()._prepare_inputs(inputs)
        return self.guard.micro_batch

    def _get_grad_norm(self, *args: Any, **kwargs: Any):
        return self.guard.check_norm(super()._get_grad_norm(*args, **kwargs))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with self.keeper.saving(folder, self.state):
            super()._save_checkpoint(model, trial)
