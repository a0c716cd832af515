"""Checkpoints that are whole or not there: a manifest written last, resuming from the newest whole one, the table."""

import dataclasses
import json
import logging
import math
import operator
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler, ExportableState

from r2ec_trl.errors import UserError
from r2ec_trl.files import file_sha256, write_json
from r2ec_trl.items.table import ItemTable

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
MAX_TABLE_BYTES = 2**30  # a larger table is encoded anew when a run resumes
BEST = ("best_model_checkpoint", "best_metric", "best_global_step")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_ANOTHER = f"give another checkpoint, or '{LATEST}' for the newest whole one."
_STATE_NEEDED = ("global_step", "epoch")
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("global_step", "max_steps", "best_global_step", "num_input_tokens_seen"), (int,)),
    **dict.fromkeys(("epoch", "num_train_epochs", "total_flos", "best_metric"), (int, float)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (int, float)),
    "train_batch_size": (int,),
    "log_history": (list,),
    "stateful_callbacks": (dict,),
    "best_model_checkpoint": (str,),
}


def write_manifest(folder: Path) -> None:
    """
    Say that a checkpoint is whole: every file with its size and SHA-256, written beside and renamed. Its number is one
    more than that of any other of the run: a run that went back to an earlier step, or was copied, keeps its order.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    numbers = [number for number, _ in map(_age, checkpoints(folder.parent)) if number < math.inf]
    write_json(folder / MANIFEST, {"files": files, "number": 1 + max(numbers, default=0)})


def _manifest(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Size and SHA-256 of each file that a manifest names (a manifest of version 0.1 has sizes only)."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {
        name: (entry, None) if isinstance(entry, int) else (entry["bytes"], entry["sha256"])
        for name, entry in files.items()
    }


def is_whole(folder: str | os.PathLike, content: bool = False) -> bool:
    """
    Whether a checkpoint's manifest is there and every file has the size it names; with `content`, also its SHA-256
    (each file is read once, as a stream).
    """
    folder = Path(folder)
    try:
        for name, (size, digest) in _manifest(folder).items():
            path = folder / name
            if path.stat().st_size != size or (content and digest is not None and file_sha256(path) != digest):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def read_state(folder: Path) -> TrainerState:
    """
    A checkpoint's `trainer_state.json`, its types checked.

    Raises:
        [`UserError`]: names the field that is none of transformers', or of another type.
    """
    path = folder / "trainer_state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        fields = {field.name for field in dataclasses.fields(TrainerState)}
        wrong = sorted(set(values) - fields) if isinstance(values, dict) else ["the whole"]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {_ANOTHER}") from error
    for name, kinds in _STATE_TYPES.items() if isinstance(values, dict) else ():
        value = values.get(name)
        if (value is None and name in _STATE_NEEDED) or not isinstance(value, (*kinds, type(None))):
            wrong.append(name)
        elif isinstance(value, bool) or (isinstance(value, (int, float)) and not 0 <= value < math.inf):
            wrong += [name] if name != "best_metric" else []
    if not wrong and not all(isinstance(log, dict) for log in values.get("log_history") or []):
        wrong.append("log_history")
    if wrong:
        raise UserError(f"{path}: `{wrong[0]}` is not what transformers writes there; {_ANOTHER}")
    return TrainerState(**values)


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The `checkpoint-N` folders of a run in the order in which they were written, those without a manifest last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_age)


def latest_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run, `None` without one; newer ones that are not whole are warned of."""
    for path in reversed(checkpoints(output_dir)):
        if is_whole(path, content=True):
            return path
        logger.warning("%s is %s: skipped.", path, "damaged" if is_whole(path) else "half-written")
    return None


def named_checkpoint(name: str) -> Path:
    """The folder that `resume_from_checkpoint` names; [`UserError`] where it is no checkpoint."""
    if not Path(name, "trainer_state.json").is_file():
        raise UserError(f"`resume_from_checkpoint`: {name} is no checkpoint; give its folder, or '{LATEST}'.")
    return Path(name)


def remove_old_checkpoints(output_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """
    Delete the oldest checkpoints beyond `limit` (`save_total_limit`; `None` keeps all), half-written ones first; never
    the newest whole one, never the best.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    whole = [path for path in found if is_whole(path)]
    kept = set(whole[-1:]) | {path for path in whole if best is not None and path.name == Path(best).name}
    candidates = [path for path in found if path not in whole] + [path for path in whole if path not in kept]
    for path in candidates[: max(0, len(found) - max(limit, len(kept)))]:
        _remove(path)


def is_write_error(error: BaseException) -> bool:
    """Whether an exception says that a file could not be written (torch and safetensors have their own kinds)."""
    if isinstance(error, (OSError, SafetensorError, UserError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("PytorchStreamWriter", "file write failed", "unexpected pos", "iostream error")
    )


class CheckpointKeeper(TrainerCallback):
    """
    Keeps a run's checkpoints whole, and picks up a run where one was left: the item table is saved with each, the
    manifest comes last, and only then are older checkpoints deleted.

    Args:
        table ([`~r2ec_trl.items.table.ItemTable`]):
            Saved with each checkpoint, and given its rows back.
        accelerator ([`~accelerate.Accelerator`]):
            Waits for the other processes.
        args ([`~transformers.TrainingArguments`]):
            `output_dir`, `save_total_limit` and which process saves.
        handler ([`~transformers.trainer_callback.CallbackHandler`]):
            Knows the other callbacks: early stopping's counter goes on with the run.
    """

    def __init__(self, table: ItemTable, accelerator: Any, args: Any, handler: CallbackHandler):
        self.table, self.accelerator, self.args, self.handler = table, accelerator, args, handler
        self.resumed: TrainerState | None = None

    # ------------------------------------------------------------------ resume
    def resume_from(self, wanted: str | bool | None) -> Path | None:
        """
        The checkpoint to go on from, its table loaded; `None` to start from the beginning.

        Args:
            wanted (`str` or `bool`, *optional*):
                A checkpoint's folder, or `"latest"` (or `True`): the newest whole one of `output_dir`, if any.
        """
        self.resumed = None
        folder = self._choose(wanted)
        if folder is None:
            return None
        if [path for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern)]:
            raise UserError(f"{folder} holds pickled weights (.bin), which can run code; {_ANOTHER}")
        state = read_state(folder)
        if state.best_model_checkpoint is not None:
            best = folder.parent / Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(best)
            if best not in checkpoints(folder.parent):
                logger.warning("The best checkpoint so far, %s, is not there: the best is looked for anew.", best)
                state.best_model_checkpoint = state.best_metric = state.best_global_step = None
        try:
            self.table.load(folder)
        except UserError as error:
            self.table.clear()  # an evaluation of the start may have filled it
            logger.warning("The item table is encoded anew: %s", error)
        if self.args.device.type == "cpu":  # of several processes it is "cpu:0", a place torch.load does not know
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        logger.info("Resuming from %s (step %d).", folder, state.global_step)
        if not [path for pattern in ("optimizer.*", "global_step*") for path in folder.glob(pattern)]:
            logger.warning("%s holds no optimizer (`save_only_model`): it starts anew.", folder)
        self.resumed = state
        return folder

    def position(self, batches: int) -> tuple[int, int]:
        """
        Epochs, and micro-batches of the next one, that a resumed run has behind it, as transformers counts them.

        Args:
            batches (`int`):
                Micro-batches an epoch.
        """
        step = 0 if self.resumed is None else self.resumed.global_step
        epochs, steps = divmod(step, max(1, -(-batches // self.args.gradient_accumulation_steps)))
        return epochs, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def is_finished(self, max_steps: int) -> bool:
        """
        Whether the run that was resumed had come to its end: all steps taken, or stopped early under the same limits.
        """
        state = self.resumed
        if state is None or state.global_step >= max_steps:
            return state is not None
        saved: Any = dict(state.stateful_callbacks or {})
        control = saved.pop("TrainerControl", None)
        stopped = isinstance(control, dict) and control.get("args", {}).get("should_training_stop", False)
        limits = {name: entry.get("args") if isinstance(entry, dict) else None for name, entry in saved.items()}
        same = limits == {name: callback.state()["args"] for name, callback in self._counting().items()}
        return bool(stopped) and state.max_steps == max_steps and same

    def _counting(self) -> dict[str, Any]:
        """Callbacks that transformers saves with a checkpoint, by name."""
        found = [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]
        return {type(callback).__name__: callback for callback in found}

    def _choose(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted is True or wanted == LATEST:
            folder = latest_checkpoint(self.args.output_dir)
            if folder is None:
                logger.warning("No whole checkpoint in %s: starting from the beginning.", self.args.output_dir)
            return folder
        folder = named_checkpoint(str(wanted))
        if (folder / MANIFEST).is_file() and not is_whole(folder, content=True):
            fault = "damaged" if is_whole(folder) else "missing or cut short"
            raise UserError(f"`resume_from_checkpoint`: files of {folder} are {fault}; {_ANOTHER}")
        return folder

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """
        TRL's sampler shuffles each epoch anew from one generator: a resumed run draws what was drawn before. Of the
        best checkpoint it knows what [`resume_from`] found, nothing outside of the run; early stopping counts on.
        """
        saved: Any = state.stateful_callbacks
        state.stateful_callbacks = {"TrainerControl": control.state()}
        for name, callback in self._counting().items():
            counted = saved[name].get("attributes", {}) if isinstance(saved.get(name), dict) else {}
            for attribute in callback.state()["attributes"].keys() & counted.keys():
                setattr(callback, attribute, counted[attribute])
            state.stateful_callbacks[name] = callback.state()  # transformers saves only what is named here
        for name in BEST if self.resumed is not None else ():
            setattr(state, name, getattr(self.resumed, name))
        if self.resumed is not None and train_dataloader is not None:
            self._compare_epochs(self.resumed, len(train_dataloader))
        batches: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # accelerate's shard of it
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        generator = getattr(sampler, "generator", None)
        if type(sampler).__name__ == "RepeatSampler" and generator is not None:
            for _ in range(self.position(len(train_dataloader))[0]):
                torch.randperm(sampler.num_samples, generator=generator)

    def _compare_epochs(self, resumed: TrainerState, batches: int) -> None:
        """Say it where the steps taken are another part of the data now: transformers goes by steps alone."""
        steps = max(1, -(-batches // self.args.gradient_accumulation_steps))
        if abs((resumed.epoch or 0) * steps - resumed.global_step) > 1:
            logger.warning(
                "Step %d was epoch %.2f of the run and counts as epoch %.2f now: the batch, the number of processes "
                "or the data are others, so it does not go on with the users that come next.",
                resumed.global_step,
                resumed.epoch or 0,
                resumed.global_step / steps,
            )

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        """A new best is saved at once: `save_steps` may be a multiple of `eval_steps`, and then it would be gone."""
        name, best = f"eval_{args.metric_for_best_model}".replace("eval_eval_", "eval_"), state.best_metric
        if args.load_best_model_at_end and name in metrics:
            better = operator.gt if args.greater_is_better else operator.lt
            control.should_save |= best is None or better(metrics[name], best)

    # -------------------------------------------------------------------- save
    @contextmanager
    def saving(self, folder: Path, state: Any) -> Iterator[None]:
        """Around transformers' writing of a checkpoint; a failing write leaves no half-written folder."""
        saves = self.args.should_save
        if saves and folder.exists():  # left half-written, or of an earlier run of the same steps
            _remove(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # ours follows the manifest
        try:
            yield
            if saves and 0 < self.table.num_bytes <= MAX_TABLE_BYTES:
                self.table.save(folder)
            self.accelerator.wait_for_everyone()
            if saves:
                write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError, UserError) as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(_write_failure(folder, error)) from error
        finally:
            self.args.save_total_limit = limit
        if saves:
            remove_old_checkpoints(folder.parent, limit, state.best_model_checkpoint)


def _write_failure(folder: Path, error: BaseException) -> str:
    whole = [path for path in checkpoints(folder.parent) if is_whole(path)]
    left = f"{whole[-1]} is whole" if whole else "no checkpoint is left"
    reason = " ".join(str(error).split())[:200]
    return (
        f"The checkpoint {folder} could not be written ({reason}); {left}. Free some space (a lower "
        f"`--save_total_limit` keeps fewer), then go on with `--resume_from_checkpoint {LATEST}`."
    )


def _remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: a kill in between leaves no folder that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path) -> tuple[float, int]:
    """Number of a checkpoint's manifest (0 in those of version 0.1, infinity without a manifest), and its step."""
    try:
        number: float = int(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("number", 0))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        number = math.inf
    return number, int(folder.name.rsplit("-", 1)[1])
