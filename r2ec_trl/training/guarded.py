"""What both trainers wire into transformers' loop: the guard around a run, and checkpoints that are whole."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from r2ec_trl.items.table import ItemTable
from r2ec_trl.training.checkpoints import CheckpointKeeper
from r2ec_trl.training.faults import RunGuard, SaveOnTerminate
from r2ec_trl.training.telemetry import Telemetry

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


@contextmanager
def stable_rollout_func() -> Iterator[None]:
    """TRL calls `rollout_func` experimental at each start; setup.cfg admits one minor release, whose tests pin it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        yield


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
        self.keeper = CheckpointKeeper(self.table, self.accelerator, self.args, self.callback_handler)
        self.add_callback(telemetry)
        self.add_callback(self.keeper)

    def steps_taken(self) -> int:
        """Optimizer steps so far."""
        return self.state.global_step

    @property
    def last_rollout_example(self) -> dict[str, Any]:
        """One rollout of the newest step with its user, rank and top items, for display."""
        return next(iter(self.last_rollouts), {})

    @property
    def last_rollouts(self) -> list[dict[str, Any]]:
        """Rollouts of different users of the newest step, `num_completions_to_print` of them (1 by default)."""
        return self.telemetry.last_rollouts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        As [`~transformers.Trainer`]'s.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `"latest"` (or `True`): the newest whole one of `output_dir`, if any.
        """
        terminate = SaveOnTerminate(self.accelerator)
        self.add_callback(terminate)
        # TRL's: rollouts that an interrupted run left are of other users, and vLLM may hold weights of an earlier run
        self._step, self._buffered_inputs, self._last_loaded_step = 0, None, -1
        try:
            with self.guard:
                folder = self.keeper.resume_from(resume_from_checkpoint)
                with self._no_step_more(), self._adapters_as_they_were(folder):
                    return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:  # a run that failed or was interrupted, too: the process may go on
            terminate.restore()
            self.remove_callback(terminate)

    @contextmanager
    def _adapters_as_they_were(self, folder: Path | None) -> Iterator[None]:
        """
        transformers reads adapters of a checkpoint by `load_adapter`, which makes float32 of QLoRA's bfloat16: here
        they keep their dtype. Where TRL laid a reference beside the trained adapter, transformers reads that alone.
        """
        adapters = getattr(self.model, "peft_config", ())
        if folder is None or not adapters:
            yield
            return
        inner = self.model.load_adapter
        self.model.load_adapter = partial(inner, autocast_adapter_dtype=False)
        try:
            if len(adapters) > 1 and "default" in adapters and (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
                self.model.load_adapter(str(folder), "default", is_trainable=True)
            yield
        finally:
            del self.model.load_adapter

    @contextmanager
    def _no_step_more(self) -> Iterator[None]:
        """A run that was finished is loaded and not trained: transformers' loop would take one step and then look."""
        settings, resumed = self.args, self.keeper.resumed
        max_steps = self._max_steps() if resumed is not None else 0
        if resumed is None or not self.keeper.is_finished(max_steps):
            yield
            return
        logger.warning("The run ended at step %d: nothing is left to train.", resumed.global_step)
        kept = settings.max_steps, settings.num_train_epochs, settings.eval_on_start
        settings.max_steps, settings.num_train_epochs, settings.eval_on_start = -1, 0, False
        try:
            yield
        finally:
            settings.max_steps, settings.num_train_epochs, settings.eval_on_start = kept
            self.state.max_steps = max_steps

    def _max_steps(self) -> int:
        """Optimizer steps of the whole run, as transformers counts them."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1] or 0)

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
