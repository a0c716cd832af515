"""What stops a run, and how: one sentence that names the knob, on every process, in bounded time."""

import json
import logging
import math
import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from r2ec_trl.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # how often a process asks after the others
GRACE_SECONDS = 10.0  # between a stop and the end of the process, whatever still hangs
TIMEOUT_SHARE = 0.9  # of `ddp_timeout`: before the backend ends the process without a word on who is missing
SIGTERM_STATUS = 128 + signal.SIGTERM

MEMORY_KNOBS = {
    "generate": "lower `--max_completion_length`, `--num_generations` or users a step (all rollouts of "
    "`--per_device_train_batch_size` x `--steps_per_generation` are generated at once), or add `--use_vllm`",
    "score": "lower `--forward_token_budget`",
    "items": "lower `--forward_token_budget`",
    "evaluate": "lower `--forward_token_budget` (greedy rollouts take twice as many tokens at once)",
    "train": "lower `--per_device_train_batch_size` (and raise `--gradient_accumulation_steps` as much), leave "
    "`--gradient_checkpointing` on, or add `--load_in_4bit`",
}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator", re.IGNORECASE)
LOST_PROCESS = re.compile(r"timed? ?out|connection (was )?(closed|reset|refused)|socket error", re.IGNORECASE)


class ProcessWatch:
    """
    Each process tells the launcher's store where it is, and a thread of each looks at the others: when one has stopped
    with an error, all end with its sentence; when one does not go on while the others wait, all end with its rank.

    Args:
        rank, processes (`int`):
            This process, and how many there are. One alone is not watched.
        timeout (`float`):
            Seconds without progress, while another process is elsewhere, that count as hanging.
        poll (`float`, *optional*, defaults to `POLL_SECONDS`):
            Seconds between two looks.
    """

    _number = 0  # of this watch among the process's

    def __init__(self, rank: int, processes: int, timeout: float, poll: float = POLL_SECONDS):
        self.rank, self.processes, self.timeout, self.poll = rank, processes, timeout, poll
        self.count, self.place, self.since = 0, "the start", time.monotonic()
        self._done = threading.Event()
        self._store: Any = None
        ProcessWatch._number += 1
        self._prefix = f"r2ec/{ProcessWatch._number}/"

    def __enter__(self) -> "ProcessWatch":
        if self.processes > 1 and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            threading.Thread(target=self._look, name="r2ec-process-watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._store is not None and isinstance(error, Exception):
            self._set("fault", f"rank {self.rank} stopped at {self.place}: {' '.join(str(error).split())[:500]}")
            timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
            timer.daemon = True
            timer.start()  # an interpreter can wait for ever for a collective that the others never join
        self._done.set()

    def beat(self, place: str) -> None:
        """This process has come to `place`."""
        self.count, self.place, self.since = self.count + 1, place, time.monotonic()

    def missing(self) -> str:
        """Who is behind the others, and where, as words; empty where nobody is."""
        if self._store is None:
            return ""
        seen: dict[int, tuple[int, str]] = {}
        for rank in range(self.processes):
            key = f"{self._prefix}place/{rank}"
            seen[rank] = tuple(json.loads(self._store.get(key))) if self._store.check([key]) else (0, "the start")
        seen[self.rank] = (self.count, self.place)
        last = min(count for count, _ in seen.values())
        behind = [f"rank {rank} is still at {place}" for rank, (count, place) in seen.items() if count == last]
        return ", ".join(behind) if any(count > last for count, _ in seen.values()) else ""

    def _set(self, name: str, value: str) -> None:
        try:
            self._store.set(self._prefix + name, value)
        except (RuntimeError, OSError) as error:
            logger.debug("The launcher's store is gone: %s", error)

    def _look(self) -> None:
        while not self._done.wait(self.poll):
            try:
                self._set(f"place/{self.rank}", json.dumps([self.count, self.place]))
                if self._store.check([self._prefix + "fault"]):
                    sentence = self._store.get(self._prefix + "fault").decode()
                    if not self._done.wait(self.poll):  # time for this process's own error, if it has the same
                        self._end(f"Stopped, because {sentence}")
                    return
                waited = time.monotonic() - self.since
                if waited > self.timeout and (behind := self.missing()):
                    sentence = (
                        f"no progress for {waited:.0f} s: {behind}, while rank {self.rank} waits at {self.place}"
                    )
                    self._set("fault", sentence)
                    self._end(sentence[0].upper() + sentence[1:] + "; look at that rank's machine and output.")
            except (RuntimeError, OSError) as error:
                logger.debug("The launcher's store is gone: %s", error)
                return

    def _end(self, sentence: str) -> None:
        logger.error("[rank %d] %s", self.rank, sentence)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)


class SaveOnTerminate(TrainerCallback):
    """
    On SIGTERM (a scheduler takes the machine): finish the optimizer step, save, exit with status 143. Processes agree
    on it after each step, since the signal reaches them at different moments.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.received = self.leaving = False
        self._before: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        received = torch.tensor([float(self.received)], device=self.accelerator.device)
        if self.accelerator.gather(received).sum() > 0:
            logger.warning("SIGTERM: saving step %d, then leaving.", state.global_step)
            self.leaving = True
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.leaving:
            self._restore()
            self.accelerator.end_training()
            raise SystemExit(SIGTERM_STATUS)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


class FaultStops(_Base):
    """
    Mixin for a [`~transformers.Trainer`]. What is overridden, and why:

    - `train`: out of memory, a lost process and any error on one process end all of them, with a sentence.
    - `evaluate`: an error in it is told from one in a step.
    - `training_step`: a loss that is no number ends the run (transformers hides it from the log), its rows saved.
    - `_prepare_inputs`: remembers the micro-batch for that.
    - `_get_grad_norm`: a gradient that is no number ends the run before it reaches the weights.
    - `_calculate_rewards`: a reward that is no number ends the run, the rollouts saved.
    """

    phase = "train"  # what a failure happens in, a key of MEMORY_KNOBS
    _micro_batch: Any = None
    _watch: ProcessWatch | None = None

    def train(self, *args: Any, **kwargs: Any):
        if not any(isinstance(callback, SaveOnTerminate) for callback in self.callback_handler.callbacks):
            self.add_callback(SaveOnTerminate(self.accelerator))
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        with ProcessWatch(rank, processes, TIMEOUT_SHARE * self.args.ddp_timeout) as self._watch:
            try:
                return super().train(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                sentence = self._explain(error, self._watch)
                if sentence is None:
                    raise
                raise UserError(sentence) from error

    def _explain(self, error: BaseException, watch: ProcessWatch) -> str | None:
        """One sentence for an error that has a known cause, `None` for any other."""
        where = f"rank {watch.rank}, step {self.state.global_step}"
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return f"Out of memory in '{self.phase}' ({where}); {MEMORY_KNOBS[self.phase]}."
        if watch.processes > 1 and LOST_PROCESS.search(str(error)):
            behind = watch.missing() or "a process is gone"
            return f"A collective failed in '{self.phase}' ({where}): {behind}; look at that rank's output."
        return None

    def training_step(self, *args: Any, **kwargs: Any):
        self.come_to("train")
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            path = self._save_offenders(_rows_of(self._micro_batch, self.processing_class))
            raise UserError(f"The loss is {loss.item()} at step {self.state.global_step}; its rows are in {path}.")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any):
        self.come_to("evaluate")
        metrics = super().evaluate(*args, **kwargs)
        self.come_to("train")
        return metrics

    def come_to(self, phase: str) -> None:
        """The step has come to a phase: an error now belongs to it, and the other processes can see it."""
        self.phase = phase
        if self._watch is not None:
            self._watch.beat(f"'{phase}' of step {self.state.global_step}")

    def _prepare_inputs(self, inputs):
        self._micro_batch = super()._prepare_inputs(inputs)
        return self._micro_batch

    def _get_grad_norm(self, *args: Any, **kwargs: Any):
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:  # fp16 scales until it fits
            path = self._save_offenders(_rows_of(self._micro_batch, self.processing_class))
            raise UserError(
                f"The gradient's norm is {float(norm)} at step {self.state.global_step}, and the step was not taken; "
                f"the last rows are in {path}. Lower `--learning_rate` or set `--max_grad_norm`."
            )
        return norm

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        try:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except UserError as error:
            rows = [{**row, "completion": completion} for row, completion in zip(inputs, completions, strict=True)]
            raise UserError(f"{error} The rollouts are in {self._save_offenders(rows)}.") from error

    def _save_offenders(self, rows: list[dict[str, Any]]) -> Path:
        folder = Path(self.args.output_dir) / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step{self.state.global_step}-rank{self.accelerator.process_index}.json"
        path.write_text(json.dumps(rows, indent=1, default=str, ensure_ascii=False), encoding="utf-8")
        return path


def _rows_of(batch: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A micro-batch of token ids as text, with what else it holds a number of a row."""
    if not isinstance(batch, dict):
        return [{"batch": str(batch)}]
    ids = [key for key in ("prompt_ids", "completion_ids", "input_ids") if key in batch]
    rows = []
    for row in range(len(batch[ids[0]]) if ids else 0):
        texts = {key: tokenizer.decode(batch[key][row].tolist(), skip_special_tokens=True) for key in ids}
        values = {
            key: value[row].item()
            for key, value in batch.items()
            if isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) > row
        }
        rows.append({**texts, **values})
    return rows
