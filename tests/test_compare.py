"""recipes/compare.py from the command line."""

import json
import runpy
import sys
from pathlib import Path

import polars as pl
import pytest

from r2ec_trl.evaluation.report import protocol, report, write_report

RECIPE = Path(__file__).parents[1] / "recipes" / "compare.py"


def compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    runpy.run_path(str(RECIPE), run_name="__main__")


def write(folder, ranks, users="uuvw", **settings):
    frame = pl.DataFrame({"user_id": list(users), "target": list("abac"), "rank": ranks, "rank_masked": ranks})
    card = {"source": "shop", "sha256": {"test": "aa", "items": "bb"}, "counts": {"items": 9}}
    write_report(folder, report(frame, {}, protocol(card, settings, seed=0)), frame)
    return folder


def test_two_folders(tmp_path, monkeypatch, capsys):
    before = write(tmp_path / "before", (1, 3, 2, 10), reasoning="none")
    after = write(tmp_path / "after", (1, 1, 1, 10), reasoning="full")
    output = tmp_path / "comparison.json"
    compare(monkeypatch, "--before", before, "--after", after, "--cutoffs", 1, "--output", output)
    assert "settings.reasoning: none -> full" in capsys.readouterr().out
    comparison = json.loads(output.read_text())
    assert comparison["unmasked"]["hit@1"]["difference"] == 0.5
    assert comparison["protocol_differences"] == {"settings.reasoning": ["none", "full"]}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--after", "{other}"], "of the same users and targets"),
        (["--after", "{none}"], "holds no ranks.parquet"),
        (["--after", "{before}", "--afterr", "x"], "unknown flag '--afterr'"),
        (["--after", "{before}", "--cutoffs", "0"], "The cutoff is 0"),
        (["--after", "{before}", "--output", "{before}"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    folders = {"before": write(tmp_path / "before", (1, 3, 2, 10)), "none": tmp_path / "none"}
    folders["other"] = write(tmp_path / "other", (10, 2, 3, 1), users="wvuu")
    with pytest.raises(SystemExit) as caught:
        compare(monkeypatch, "--before", folders["before"], *(word.format(**folders) for word in words))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in error and error.count("\n") == 1
