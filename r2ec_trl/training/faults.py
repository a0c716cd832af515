"""What stops a run, and how: one sentence that names the knob, on every process, in bounded time."""

import json
import logging
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from r2ec_trl.errors import UserError
from r2ec_trl.files import write_text
from r2ec_trl.training.process_watch import ProcessWatch
from r2ec_trl.training.telemetry import Telemetry

logger = logging.getLogger(__name__)

TIMEOUT_SHARE = 0.9  # of `ddp_timeout`: before the backend ends the process without a word on who is missing
SIGTERM_STATUS = 128 + signal.SIGTERM

MEMORY_KNOBS = {
    "generate": "lower `--max_completion_length`, `--num_generations` or users a step (all rollouts of "
    "`--per_device_train_batch_size` x `--steps_per_generation` are generated at once), or add `--use_vllm`",
    "sync": "lower `--vllm_gpu_memory_utilization`, or add `--vllm_lora_sync`",
    "score": "lower `--forward_token_budget`",
    "items": "lower `--forward_token_budget`",
    "evaluate": "lower `--forward_token_budget` (greedy rollouts take twice as many tokens at once)",
    "train": "lower `--per_device_train_batch_size` (and raise `--gradient_accumulation_steps` as much), leave "
    "`--gradient_checkpointing` on, or add `--load_in_4bit`",
}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator", re.IGNORECASE)
LOST_PROCESS = re.compile(r"timed? ?out|connection (was )?(closed|reset|refused)|socket error", re.IGNORECASE)


class RunGuard:
    """
    Context manager around a training run: out of memory, a lost process and any error on one process end all of them,
    with one sentence where the cause is known. Numbers that are none end the run before they reach the weights.

    Args:
        telemetry ([`~r2ec_trl.training.telemetry.Telemetry`]):
            Knows the phase and the step; gets the watch over the other processes.
        args ([`~transformers.TrainingArguments`]):
            `output_dir`, `ddp_timeout` and `fp16`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the rows that are kept as evidence.
    """

    def __init__(self, telemetry: Telemetry, args: Any, tokenizer: Any):
        self.telemetry, self.args, self.tokenizer = telemetry, args, tokenizer
        self.micro_batch: Any = None

    def __enter__(self) -> "RunGuard":
        accelerator = self.telemetry.accelerator
        timeout = TIMEOUT_SHARE * self.args.ddp_timeout
        self.watch = ProcessWatch(accelerator.process_index, accelerator.num_processes, timeout)
        self.telemetry.watch = self.watch.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        sentence = self._explain(error) if isinstance(error, (RuntimeError, MemoryError)) else None
        told = error if sentence is None else UserError(sentence)
        self.watch.__exit__(None if told is None else type(told), told, traceback)
        self.telemetry.watch = None
        if sentence is not None:
            raise told from error  # type: ignore[misc]

    def _explain(self, error: BaseException) -> str | None:
        """One sentence for an error that has a known cause, `None` for any other."""
        phase = self.telemetry.phase
        where = f"process {self.watch.process_index}, step {self.telemetry.step()}"
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return f"Out of memory in '{phase}' ({where}); {MEMORY_KNOBS[phase]}."
        if self.watch.processes > 1 and LOST_PROCESS.search(str(error)):
            behind = self.watch.missing() or "a process is gone"
            return f"A collective failed in '{phase}' ({where}): {behind}; look at that process's output."
        return None

    def check_loss(self, loss: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        """The loss, if it is a number (transformers hides others from the log); else its rows are saved."""
        if not torch.isfinite(loss):
            path = self.save_offenders(_rows_of(micro_batch, self.tokenizer))
            raise UserError(f"The loss is {loss.item()} at step {self.telemetry.step()}; its rows are in {path}.")
        return loss

    def check_norm(self, norm: Any) -> Any:
        """The gradient's norm, if it is a number or fp16, which scales until it fits, still looks for its scale."""
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:
            path = self.save_offenders(_rows_of(self.micro_batch, self.tokenizer))
            raise UserError(
                f"The gradient's norm is {float(norm)} at step {self.telemetry.step()}, and the step was not taken; "
                f"the last rows are in {path}. Lower `--learning_rate` or set `--max_grad_norm`."
            )
        return norm

    @contextmanager
    def keeping(self, rows: Callable[[], list[dict[str, Any]]]) -> Iterator[None]:
        """A [`UserError`] inside also says where these rows were saved."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{error} The rollouts are in {self.save_offenders(rows())}.") from error

    def save_offenders(self, rows: list[dict[str, Any]]) -> Path:
        """Write rows as evidence into `output_dir/faults`."""
        folder = Path(self.args.output_dir) / "faults"
        process_index = self.telemetry.accelerator.process_index
        path = folder / f"step{self.telemetry.step()}-process{process_index}.json"
        write_text(path, json.dumps(rows, indent=1, default=str, ensure_ascii=False))
        return path


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
            self.restore()
            self.accelerator.end_training()
            raise SystemExit(SIGTERM_STATUS)

    def restore(self) -> None:
        """SIGTERM does again what it did before the training."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


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
