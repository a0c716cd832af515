"""Text is made harmless before it is printed; long work is seen, short work is not."""

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from r2ec_trl import progress
from r2ec_trl.cli import terminal
from r2ec_trl.cli.terminal import WorkDisplay, printable, say, start_logging


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("orvo bow", "orvo bow"),
        ("Überraschung ☂ 日本 e\u0301 👩\u200d🔧", "Überraschung ☂ 日本 e\u0301 👩\u200d🔧"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b2K\x7f\r\n\t", r"\x9b2K\x7f\r\n\t"),
        ("a\u202eb\u2066c\u2069d\u2028e", r"a\u202eb\u2066c\u2069d\u2028e"),
        ("\ud800", r"\ud800"),
        (None, "None"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(st.text(alphabet=st.characters()))
def test_nothing_printable_steers_a_terminal(text):
    shown = printable(text)
    assert not any(ord(code) < 32 or 127 <= ord(code) < 160 or 0xD800 <= ord(code) < 0xE000 for code in shown)
    shown.encode("utf-8")
    assert printable(shown) == shown


def lines_console():
    return Console(file=io.StringIO(), width=100)


def test_a_line_and_a_warning_are_harmless():
    console = lines_console()
    say("title \x1b[31m[bold]", console)
    assert console.file.getvalue() == "title \\x1b[31m[bold]\n"
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        start_logging(console=console)
        logging.getLogger("r2ec_trl.test").warning("item %s", "\x1b[2J")
        logging.getLogger("r2ec_trl.test").info("not shown")
        root.handlers[:] = []
        start_logging(shown=False, console=console)
        logging.getLogger("r2ec_trl.test").warning("another process")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    text = console.file.getvalue()
    assert "\\x1b[2J" in text and "\x1b" not in text and "not shown" not in text and "another process" not in text


def reports(monkeypatch, console, seconds, **settings):
    clock = iter(seconds)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with WorkDisplay(console=console, **settings):
        for done in range(len(seconds)):
            progress.report("encoding", done, len(seconds) - 1)
    return console.file.getvalue()


def test_a_line_every_ten_seconds_and_one_at_the_end(monkeypatch):
    text = reports(monkeypatch, lines_console(), [0, 4, 11, 15, 22, 23])
    rates = ("2 of 5, 11 s, 0.2 a second, 16 s left", "4 of 5, 22 s, 0.2 a second, 6 s left")
    assert text == "".join(f"encoding: {line}\n" for line in (*rates, "5 of 5, 23 s, 0.2 a second, 0 s left"))


def test_short_work_and_other_processes_are_silent(monkeypatch):
    assert reports(monkeypatch, lines_console(), [0, 3, 6]) == ""
    assert reports(monkeypatch, lines_console(), [0, 30, 60], shown=False) == ""
    progress.report("encoding", 0, 1)  # closed: nobody watches


def test_a_bar_appears_on_a_terminal_and_goes(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert "encoding" in reports(monkeypatch, console, [0, 2, 3])
    assert console.file.getvalue().rstrip().endswith("\x1b[2K\x1b[?25h")  # wiped, and the cursor is back
