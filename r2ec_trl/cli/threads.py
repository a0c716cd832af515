"""CPU threads of a process: a launcher sets one where the user said nothing, which leaves the other cores idle."""

import os
from pathlib import Path

import torch

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # a launcher sets one of them


def set_by_user() -> bool:
    """Whether `OMP_NUM_THREADS` is the user's own: it stood in the launcher's environment or on its command line."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if not any(name in os.environ for name in LAUNCHED):
        return True
    launcher = Path("/proc") / str(os.getppid())
    try:
        return (
            b"OMP_NUM_THREADS=" in (launcher / "environ").read_bytes()
            or b"num_cpu_threads_per_process" in (launcher / "cmdline").read_bytes()
        )
    except OSError:  # no such place on this system: leave what is set
        return True


def use_cores() -> int | None:
    """
    On a machine without a GPU, use the cores there are, shared out over the processes of this machine.

    Returns:
        `int`: how many threads were set; `None` where there is a GPU, or the user said how many.
    """
    if torch.cuda.is_available() or set_by_user():
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads
