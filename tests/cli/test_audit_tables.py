"""The audit on a terminal: what data say is text, never a terminal code nor markup."""

import io

from rich.console import Console

from r2ec_trl.cli.audit_tables import audit_tables

LENGTHS = {"mean": 1.0, "median": 1, "max": 1, "histogram": {"1": 1}}
AUDIT = {
    "splits": {split: {"rows": 1, "history_length": LENGTHS} for split in ("train", "validation", "test")},
    "users": 1,
    "catalogue": {"items": 3, "empty_fields": {"\x1b]0;own\x07": 2}},
    "leakage": {"row_in_two_splits": 1},
    "notes": {},
}


def shown(card):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    for table in audit_tables(AUDIT, card):
        console.print(table)
    return console.file.getvalue()


def test_times_of_some_splits_only():
    splits = {**AUDIT["splits"], "train": {**AUDIT["splits"]["train"], "first_target": "2018-01-01"}}
    console = Console(file=io.StringIO(), width=120)
    for table in audit_tables({**AUDIT, "splits": splits}, {}):
        console.print(table)
    assert console.file.getvalue().count("2018-01-01") == 1


def test_terminal_codes_and_markup_of_the_data_are_text():
    text = shown({"source": "a\x1b[2Jb [red]c[/red]", "split_rule": "given", "dropped": {"\x9b31m[blink]": 1234}})
    assert "\x1b[2J" not in text and "\x1b]0;" not in text and "\x9b" not in text and "\x07" not in text
    assert r"a\x1b[2Jb [red]c[/red]" in text and "[blink]" in text
    assert "1,234" in text and "LEAK" in text and "targets that are in two splits" in text
