"""Many callers, one model: questions wait in a bounded queue, and one thread answers them in batches."""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from r2ec_trl.errors import UserError
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.serving.recommender import Question, Recommendation, Recommender

logger = logging.getLogger(__name__)


class Refused(Exception):
    """
    A question that was not answered: the queue is full (429), its time is over (504), or the server ends (503).

    Args:
        status (`int`):
            The HTTP status that says so.
        sentence (`str`):
            Why.
        retry_after (`int`, *optional*):
            Seconds after which to ask again.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None):
        super().__init__(sentence)
        self.status, self.retry_after = status, retry_after


class Writer(Protocol):
    """Writes reasonings beside each other, as [`~r2ec_trl.vllm.async_engine.AsyncWriter`] does."""

    @property
    def alive(self) -> bool:
        """Whether it still works."""

    def write(self, prompt_ids: Sequence[int], heard: Callable[[list[int]], bool]) -> "Future[Rollout]":
        """Begin one; `heard` gets its ids so far and may end it."""

    def close(self) -> None:
        """End it."""


@dataclass(eq=False)
class Job:
    """
    One user's question on its way.

    Args:
        ask (`dict`):
            Arguments of [`~r2ec_trl.serving.recommender.Recommender.prepare`].
        deadline (`float`):
            On the monotonic clock.
        listener (`Callable`, *optional*):
            Gets each new piece of the reasoning's text, on the model's thread.
        future (`Future`):
            The answer; who no longer wants it cancels it, and the reasoning ends at its next token.
        timings (`dict`):
            `waited`, `written` (by a [`Writer`]) and `answered` in seconds, and `batch`, the users that were answered
            together.
        rollout ([`~r2ec_trl.policy.rollouts.Rollout`], *optional*):
            What a [`Writer`] wrote.
    """

    ask: Mapping[str, Any]
    deadline: float
    listener: Callable[[str], None] | None = None
    future: "Future[Recommendation]" = field(default_factory=Future)
    timings: dict[str, float] = field(default_factory=dict)
    arrived: float = field(default_factory=time.monotonic)
    told: str = ""
    rollout: Rollout | None = None

    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        if time.monotonic() > self.deadline:
            self.fail(Refused(504, "The time for this request is over; ask for less at once, or raise --deadline."))
        return self.future.done()

    def fail(self, error: BaseException) -> None:
        """End it with an error, if it has not ended."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def finish(self, result: Recommendation) -> None:
        """End it with its answer, if it has not ended."""
        with suppress(InvalidStateError):
            self.future.set_result(result)


class Batcher:
    """
    Answers questions in batches on a thread of its own, which alone runs the model and changes the catalogue.

    A question that fails leaves the others of its batch unharmed. Questions that need a reasoning written and those
    that do not are never in one batch: the quick ones do not wait for each other's tokens.

    Args:
        recommender ([`~r2ec_trl.serving.recommender.Recommender`]):
            Answers.
        max_batch (`int`, *optional*, defaults to `32`):
            Users answered together.
        window (`float`, *optional*, defaults to `0.005`):
            Seconds that the first question of a batch waits for others.
        max_queue (`int`, *optional*, defaults to `256`):
            Users that wait; one more is refused.
        observe (`Callable`, *optional*):
            Called after each batch with its users, reasoning tokens and seconds.
        writer ([`Writer`], *optional*):
            Writes the reasonings one by one, each beside those that came before; only answers are in batches then.
    """

    def __init__(
        self,
        recommender: Recommender,
        max_batch: int = 32,
        window: float = 0.005,
        max_queue: int = 256,
        observe: Callable[[int, int, float], None] | None = None,
        writer: Writer | None = None,
    ):
        self.recommender, self.observe, self.writer = recommender, observe, writer
        self.max_batch, self.window, self.max_queue = max_batch, window, max_queue
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._reads_with = copy.deepcopy(recommender.bundle.tokenizer)  # a writer is heard on a thread of its own
        self._writing: set[Job] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._rate = float(max_batch)  # users a second, lately
        self._thread = threading.Thread(target=self._work, name="recommender", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Users in the queue, from which who left is dropped, and those whose reasoning a writer writes."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.over())
            return len(self._waiting) + len(self._writing)

    @property
    def alive(self) -> bool:
        """Whether questions are still answered."""
        return self._thread.is_alive() and not self._closed and (self.writer is None or self.writer.alive)

    def submit(
        self,
        asks: Sequence[Mapping[str, Any]],
        deadline: float,
        listeners: Sequence[Callable[[str], None]] | None = None,
    ) -> list[Job]:
        """
        Put questions into the queue, all of them or none.

        Args:
            asks (`Sequence[dict]`):
                Arguments of [`~r2ec_trl.serving.recommender.Recommender.prepare`], one user each.
            deadline (`float`):
                Seconds from now after which nobody waits for the answer.
            listeners (`Sequence[Callable]`, *optional*):
                One a question; gets its reasoning as it is written.

        Raises:
            [`Refused`]: when the queue has no room for them, or the server ends.
            [`UserError`]: when there are more of them than may ever wait.
        """
        if len(asks) > self.max_queue:
            raise UserError(f"{len(asks)} users are more than may wait (--max_queue {self.max_queue}); ask for fewer.")
        until = time.monotonic() + deadline
        heard: Sequence[Callable[[str], None] | None] = listeners or [None] * len(asks)
        jobs = [Job(ask, until, listener) for ask, listener in zip(asks, heard, strict=True)]
        with self._changed:
            if not self.alive:
                raise Refused(503, "The server is shutting down; ask another one.")
            if (waiting := self.waiting) + len(jobs) > self.max_queue:
                seconds = max(1, round(waiting / self._rate))
                raise Refused(429, f"{waiting} users are waiting; ask again in {seconds} s.", seconds)
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return jobs

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Run a function on the model's thread, between two batches: a change of the catalogue."""
        future: Future[Any] = Future()
        with self._changed:
            if not self.alive:
                raise Refused(503, "The server is shutting down; ask another one.")
            if len(self._calls) >= self.max_queue:
                raise Refused(429, "Too many changes of the catalogue are waiting; ask again in 1 s.", 1)
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Refuse what comes from now on, answer what is waiting, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if self.writer is not None:
            self.writer.close()

    # ------------------------------------------------------------- the model's thread
    def _work(self) -> None:
        while (work := self._take()) is not None:
            if isinstance(work, list):
                self._answer(work)
                continue
            function, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _take(self) -> "list[Job] | tuple[Callable[[], Any], Future] | None":
        """The next batch or call; `None` once there is nothing left and nothing more will come."""
        with self._changed:
            while not (self._waiting or self._calls):
                if self._closed and not self._writing:
                    return None
                self._changed.wait()
            if self._calls:
                return self._calls.popleft()
            until = self._waiting[0].arrived + self.window
            while len(self._waiting) < self.max_batch and not self._closed and (rest := until - time.monotonic()) > 0:
                self._changed.wait(rest)
            batch: list[Job] = []
            others: list[Job] = []
            for job in self._waiting:
                if job.over():
                    continue
                fits = len(batch) < self.max_batch and (not batch or self._writes(job) == self._writes(batch[0]))
                (batch if fits else others).append(job)
            self._waiting = deque(others)
            return batch

    def _writes(self, job: Job) -> bool:
        """Whether a reasoning has to be written for it."""
        asked = job.ask.get("reasoning")  # an empty text is a reasoning, too
        mode = self.recommender.bundle.meta.protocol.reasoning if asked is None else asked
        return mode == "full" and job.rollout is None

    def _answer(self, jobs: Sequence[Job]) -> None:
        start = time.monotonic()
        ready: list[tuple[Job, Question]] = []
        for job in jobs:
            job.timings.setdefault("waited", round(start - job.arrived, 4))
            job.timings["batch"] = len(jobs)
            try:
                question = self.recommender.prepare(**job.ask)
                ready.append((job, question if job.rollout is None else replace(question, reasoning=job.rollout)))
            except Exception as error:
                job.fail(error)
        if self.writer is not None and jobs and self._writes(jobs[0]):
            for job, question in ready:
                try:
                    self._begin(job, question, self.writer)
                except Exception as error:
                    self._written(job, error)
        else:
            self._answer_ready(ready, start)

    def _begin(self, job: Job, question: Question, writer: Writer) -> None:
        """Let a reasoning be written; with it, the question waits for its answer again."""
        prompt_ids = self.recommender.bundle.prompts.user_ids(question.user)
        start = time.monotonic()

        def written(future: "Future[Rollout]") -> None:
            job.timings["written"] = round(time.monotonic() - start, 4)
            self._written(job, future.exception() or future.result())

        with self._changed:
            self._writing.add(job)
        writer.write(prompt_ids, lambda ids: self._heard(job, ids)).add_done_callback(written)

    def _written(self, job: Job, result: Rollout | BaseException) -> None:
        with self._changed:
            self._writing.discard(job)
            if isinstance(result, Rollout):
                job.rollout = result
                self._waiting.append(job)
            self._changed.notify_all()
        if isinstance(result, BaseException):
            logger.error("A reasoning could not be written.", exc_info=result)
            job.fail(result)

    def _answer_ready(self, ready: Sequence[tuple[Job, Question]], start: float) -> None:
        """Answer these together or, where that fails, in halves: one that cannot be answered is left alone with it."""
        if not ready:
            return
        jobs = [job for job, _ in ready]
        try:
            questions = [question for _, question in ready]
            results = self.recommender.answer(questions, lambda number, ids: self._heard(jobs[number], ids))
        except Exception as error:
            if len(ready) == 1:
                if not isinstance(error, UserError):
                    logger.exception("A question could not be answered.")
                jobs[0].fail(error)
                return
            logger.warning("A batch of %d failed (%s: %s); in halves.", len(ready), type(error).__name__, error)
            for half in (ready[: len(ready) // 2], ready[len(ready) // 2 :]):
                self._answer_ready(half, start)
            return
        seconds = time.monotonic() - start
        written = max(job.timings.get("written", 0.0) for job in jobs)  # beside those that are being written now
        self._rate = 0.8 * self._rate + 0.2 * (len(ready) + len(self._writing)) / max(seconds + written, 1e-3)
        for job, result in zip(jobs, results, strict=True):
            job.timings["answered"] = round(seconds, 4)
            if not job.over():
                job.finish(result)
        if self.observe is not None:
            self.observe(len(ready), sum(result.reasoning_tokens for result in results), seconds)

    def _heard(self, job: Job, ids: list[int]) -> bool:
        """Tell a listener what is new of its reasoning; whether nobody waits for it any more."""
        if job.over():
            return True
        if job.listener is not None:
            marker = self.recommender.bundle.prompts.config.marker
            text = self._reads_with.decode(ids, skip_special_tokens=True).split(marker)[0].lstrip()
            text = _settled(text, marker)
            if len(text) > len(job.told):
                job.listener(text[len(job.told) :])
                job.told = text
        return False


def _settled(text: str, marker: str) -> str:
    """`text` without an end that may still become the marker, or half of a character."""
    for length in range(min(len(marker), len(text)), 0, -1):
        if text.endswith(marker[:length]):
            text = text[:-length]
            break
    return text.rstrip("\ufffd")
