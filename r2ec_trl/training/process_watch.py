"""Processes that watch each other: when one stops or hangs, all end soon, with a sentence that says which."""

import json
import logging
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # how often a process asks after the others
GRACE_SECONDS = 10.0  # between a stop and the end of the process, whatever still hangs


class ProcessWatch:
    """
    Each process tells the launcher's store where it is, and a thread of each looks at the others: when one has stopped
    with an error, all end with its sentence; when one does not go on while the others wait, all end with its index.

    Args:
        process_index, processes (`int`):
            This process, and how many there are. One alone is not watched.
        timeout (`float`):
            Seconds without progress, while another process is elsewhere, that count as hanging.
        poll (`float`, *optional*, defaults to `POLL_SECONDS`):
            Seconds between two looks.
    """

    _number = 0  # of this watch among the process's

    def __init__(self, process_index: int, processes: int, timeout: float, poll: float = POLL_SECONDS):
        self.process_index, self.processes, self.timeout, self.poll = process_index, processes, timeout, poll
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
            self._set(
                "fault", f"process {self.process_index} stopped at {self.place}: {' '.join(str(error).split())[:500]}"
            )
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
        for index in range(self.processes):
            key = f"{self._prefix}place/{index}"
            seen[index] = tuple(json.loads(self._store.get(key))) if self._store.check([key]) else (0, "the start")
        seen[self.process_index] = (self.count, self.place)
        last = min(count for count, _ in seen.values())
        behind = [f"process {index} is still at {place}" for index, (count, place) in seen.items() if count == last]
        return ", ".join(behind) if any(count > last for count, _ in seen.values()) else ""

    def _set(self, name: str, value: str) -> None:
        try:
            self._store.set(self._prefix + name, value)
        except (RuntimeError, OSError) as error:
            logger.debug("The launcher's store is gone: %s", error)

    def _look(self) -> None:
        while not self._done.wait(self.poll):
            try:
                self._set(f"place/{self.process_index}", json.dumps([self.count, self.place]))
                if self._store.check([self._prefix + "fault"]):
                    sentence = self._store.get(self._prefix + "fault").decode()
                    if not self._done.wait(self.poll):  # time for this process's own error, if it has the same
                        self._end(f"Stopped, because {sentence}")
                    return
                waited = time.monotonic() - self.since
                if waited > self.timeout and (behind := self.missing()):
                    here = f"process {self.process_index} waits at {self.place}"
                    sentence = f"no progress for {waited:.0f} s: {behind}, while {here}"
                    self._set("fault", sentence)
                    self._end(sentence[0].upper() + sentence[1:] + "; look at that process's machine and output.")
            except (RuntimeError, OSError) as error:
                logger.debug("The launcher's store is gone: %s", error)
                return

    def _end(self, sentence: str) -> None:
        logger.error("[process %d] %s", self.process_index, sentence)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)
