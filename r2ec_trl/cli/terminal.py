"""What reaches the terminal: text made harmless, warnings, and how far long work has come."""

import logging
import time
from typing import Any

from rich import get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from r2ec_trl import progress

PATIENCE = 1.0  # seconds of one piece of work before it becomes a line of the training display
LINE_EVERY = 10.0  # seconds between lines where there is no terminal
# Controls (C0, DEL, C1), direction marks, line separators, and halves of characters, which no terminal can print
_HARMFUL = [*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in [*_HARMFUL, *range(0xD800, 0xE000)]}


def printable(text: Any, keep: str = "") -> str:
    r"""
    Text of data or of a model as a terminal may get it: control codes and direction marks are written out, so that
    `"\x1b[2J"` clears no screen. The one function for titles, ids, reasonings and what quotes them.

    Args:
        text:
            Anything with a `str`.
        keep (`str`, *optional*):
            Characters to leave as they are, such as a line end.
    """
    return str(text).translate({code: word for code, word in _ESCAPES.items() if chr(code) not in keep})


def say(line: str, console: Console | None = None) -> None:
    """Print one plain line."""
    (console or get_console()).print(printable(line), markup=False, highlight=False, soft_wrap=True)


class _Harmless(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def start_logging(shown: bool = True, console: Console | None = None) -> None:
    """Warnings through rich; errors alone where `shown` is false (all processes but the main one)."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING if shown else logging.ERROR, handlers=[handler])


def is_plain(console: Console) -> bool:
    """Whether lines are printed instead of pictures that move."""
    return not console.is_terminal or console.is_dumb_terminal


def make_bar(console: Console, *more: ProgressColumn, transient: bool = False) -> Progress:
    """The progress bar of training and of long work."""
    words = TextColumn("[bold]{task.description}")
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *more)
    return Progress(*columns, console=console, transient=transient)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "")


class WorkDisplay:
    """
    While it is open, shows the reports of [`~r2ec_trl.progress`] with rate and time left: a bar while it lasts, or a
    line every ten seconds where there is no terminal.

    Args:
        shown (`bool`, *optional*, defaults to `True`):
            False on all processes but the main one.
        console (`rich.console.Console`, *optional*):
            Where to draw. Defaults to stdout.
        bar (`rich.progress.Progress`, *optional*):
            A bar that is drawn already, to which the work becomes another line.
    """

    def __init__(self, shown: bool = True, console: Console | None = None, bar: Progress | None = None):
        self.shown, self.console, self.bar = shown, console or get_console(), bar
        self._drawn: Progress | None = None
        self._what = ""
        self._start = self._said = 0.0
        self._first = 0

    def __enter__(self) -> "WorkDisplay":
        if self.shown:
            progress.watch(self.report)
        return self

    def __exit__(self, *_: Any) -> None:
        progress.unwatch(self.report)
        self._end()

    def report(self, what: str, done: int, total: int) -> None:
        """One report, as [`~r2ec_trl.progress.report`] gives it."""
        now = time.monotonic()
        if what != self._what:
            self._end()
            self._what, self._start, self._said, self._first = what, now, now, done
        if self.bar is None and is_plain(self.console):
            if now - self._said >= LINE_EVERY or (done >= total and self._said > self._start):
                self._said = now
                line = f"{what}: {done:,} of {total:,}, {now - self._start:.0f} s"
                if done > self._first:
                    rate = (done - self._first) / max(now - self._start, 1e-3)
                    line += f", {rate:,.1f} a second, {(total - done) / rate:.0f} s left"
                say(line, self.console)
        elif self._drawn is not None:
            self._drawn.update(self._task, completed=done, total=total)
        elif done < total and (self.bar is None or now - self._start >= PATIENCE):
            self._drawn = self.bar or make_bar(self.console, _Rate(), transient=True)
            self._task = self._drawn.add_task(escape(printable(what)), total=total, completed=done)
            if self.bar is None:
                self._drawn.start()
        if done >= total:
            self._end()

    def _end(self) -> None:
        if self._drawn is not None:
            self._drawn.remove_task(self._task)
            if self.bar is None:
                self._drawn.stop()
        self._drawn, self._what = None, ""
