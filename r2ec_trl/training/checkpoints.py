"""Checkpoints that are whole or not there: a manifest written last, resuming from the newest whole one, the table."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from r2ec_trl.errors import UserError
from r2ec_trl.items.table import ItemTable

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
MAX_TABLE_BYTES = 2**30  # a larger table is encoded anew when a run resumes


def write_manifest(folder: Path) -> None:
    """Say that a checkpoint is whole: every file with its size, written beside and renamed."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    beside = folder / f"{MANIFEST}.tmp"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST)


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint's manifest is there and every file has the size it names."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The `checkpoint-N` folders of a run, whole or not, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step_of)


def latest_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run, `None` without one; newer ones that are half-written are warned of."""
    for path in reversed(checkpoints(output_dir)):
        if is_whole(path):
            return path
        logger.warning("%s is half-written: skipped.", path)
    return None


def remove_old_checkpoints(output_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """
    Delete the oldest checkpoints beyond `limit`, half-written ones first; never the newest whole one, never the best.

    Args:
        output_dir (`str`):
            Folder of the run.
        limit (`int`, *optional*):
            How many may stay (`save_total_limit`); `None` keeps all.
        best (`str`, *optional*):
            The best checkpoint so far.
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
    if isinstance(error, (OSError, SafetensorError)):
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
    """

    def __init__(self, table: ItemTable, accelerator: Any, args: Any):
        self.table, self.accelerator, self.args = table, accelerator, args
        self._epochs_done = 0

    # ------------------------------------------------------------------ resume
    def resume_from(self, wanted: str | bool | None) -> Path | None:
        """
        The checkpoint to go on from, its table loaded; `None` to start from the beginning.

        Args:
            wanted (`str` or `bool`, *optional*):
                A checkpoint's folder, or `"latest"` (or `True`): the newest whole one of `output_dir`, if any.
        """
        folder = self._choose(wanted)
        if folder is None:
            return None
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self._epochs_done = int(state["epoch"] + 1e-9)
        try:
            self.table.load(folder)
        except UserError as error:
            logger.warning("The item table is encoded anew: %s", error)
        if self.args.device.type == "cpu":  # of several processes it is "cpu:0", a place torch.load does not know
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        logger.info("Resuming from %s (step %d).", folder, state["global_step"])
        if not [path for pattern in ("optimizer.*", "global_step*") for path in folder.glob(pattern)]:
            logger.warning("%s holds no optimizer (`save_only_model`): it starts anew.", folder)
        return folder

    def _choose(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted is True or wanted == LATEST:
            folder = latest_checkpoint(self.args.output_dir)
            if folder is None:
                logger.warning("No whole checkpoint in %s: starting from the beginning.", self.args.output_dir)
            return folder
        folder = Path(str(wanted))
        if not (folder / "trainer_state.json").is_file():
            raise UserError(f"`resume_from_checkpoint`: {folder} is no checkpoint; give its folder, or '{LATEST}'.")
        if (folder / MANIFEST).is_file() and not is_whole(folder):
            raise UserError(
                f"`resume_from_checkpoint`: files of {folder} are missing or cut short; give another checkpoint, or "
                f"'{LATEST}' for the newest whole one."
            )
        return folder

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """TRL's sampler shuffles each epoch anew from one generator: a resumed run draws what was drawn before."""
        batches: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # accelerate's shard of it
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        generator = getattr(sampler, "generator", None)
        if type(sampler).__name__ == "RepeatSampler" and generator is not None:
            for _ in range(self._epochs_done):
                torch.randperm(sampler.num_samples, generator=generator)
        self._epochs_done = 0

    # -------------------------------------------------------------------- save
    @contextmanager
    def saving(self, folder: Path, state: Any) -> Iterator[None]:
        """
        Around transformers' writing of a checkpoint; a failing write leaves no half-written folder.

        Args:
            folder (`Path`):
                Where it goes.
            state ([`~transformers.TrainerState`]):
                Knows the best checkpoint so far.
        """
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
        except (OSError, RuntimeError, SafetensorError) as error:
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


def _step_of(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
