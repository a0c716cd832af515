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


def write(folder, ranks, users="uuvw", split="test", **settings):
    frame = pl.DataFrame({"user_id": list(users), "target": list("abac"), "rank": ranks, "rank_masked": ranks})
    card = {"source": "shop", "sha256": {"test": "aa", "validation": "aa", "items": "bb"}, "counts": {"items": 9}}
    write_report(folder, report(frame, {}, protocol(card, settings, 0, split)), frame)
    return folder


def test_two_folders(tmp_path, monkeypatch, capsys):
    before = write(tmp_path / "before", (1, 3, 2, 10), reasoning="none")
    after = write(tmp_path / "after", (1, 1, 1, 10), reasoning="full")
    output, figure = tmp_path / "comparison.json", tmp_path / "comparison.png"
    words = ["--before", before, "--after", after, "--metrics", "hit@1", "--seed", 3]
    compare(monkeypatch, *words, "--output", output, "--figure", figure)
    assert "settings.reasoning: none -> full" in capsys.readouterr().out
    comparison = json.loads(output.read_text())
    assert comparison["systems"][str(after)]["unmasked"]["hit@1"]["difference"] == 0.5
    assert set(comparison["systems"][str(after)]["masked"]) == {"hit@1"}
    assert comparison["protocol_differences"][str(after)] == {"settings.reasoning": ["none", "full"]}
    assert figure.read_bytes().startswith(b"\x89PNG")
    compare(monkeypatch, *words[:4], "--cutoffs", 1, 5, "--output", output)
    every = json.loads(output.read_text())["systems"][str(after)]["unmasked"]
    assert list(every) == ["hit@1", "ndcg@1", "mrr@1", "hit@5", "ndcg@5", "mrr@5"]
    assert every["hit@1"]["difference"] == 0.5


def test_many_runs_and_their_seeds(tmp_path, monkeypatch, capsys):
    ranks = {"warm0": (1, 3, 2, 10), "warm1": (2, 3, 2, 10), "new0": (1, 1, 1, 10), "new1": (1, 2, 1, 10)}
    folders = {name: write(tmp_path / name, of) for name, of in {**ranks, "old": (9, 9, 9, 9)}.items()}
    output = tmp_path / "comparison.json"
    compare(
        monkeypatch, "--before", f"warm={folders['warm0']}", f"warm={folders['warm1']}",
        "--after", f"new={folders['new0']}", f"old={folders['old']}", f"new={folders['new1']}", "--output", output,
    )  # fmt: skip
    text, comparison = capsys.readouterr().out, json.loads(output.read_text())
    assert comparison["runs"] == {"before": 2, "new": 2, "old": 1} and comparison["reference"] == "warm"
    assert comparison["folders"]["new"] == [str(folders["new0"]), str(folders["new1"])] and "new (2 seeds)" in text
    assert comparison["family"] == 8 and list(comparison["systems"]["old"]["masked"]) == ["hit@10", "ndcg@10"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--after", "{other}"],
            "{before} and {other} cannot be compared: they are not of the same users and targets",
        ),
        (["--after", "{none}"], "holds no ranks.parquet"),
        (["--after", "{before}", "--afterr", "x"], "unknown flag '--afterr'"),
        (["--after", "{before}", "--metrics", "hit@0"], "The cutoff is 0"),
        (["--after", "{before}", "--metrics", "hit@5", "--cutoffs", "5"], "give one of them"),
        (["--after", "{before}", "--metrics", "auc@5"], "`auc@5` is no metric"),
        (["--after", "{split}"], "before and {split} cannot be compared: their protocols differ in split ('test' and"),
        (["--after", "{before}", "--before", "a={before}", "b={before}"], "--before is one system, not a, b"),
        (["--after", "{before}", "--output", "{before}"], "cannot be written"),
        (["--after", "{before}", "--metrics", "hit@\u00b2"], "`hit@\u00b2` is no metric"),
        (["--after", "a={before}", "a={before}"], "{before} is given twice"),
        (["--after", "a={before}", "a={before}/"], "a run is no seed beside itself"),
        (["--before", "a={before}", "--after", "before={split}"], "a system 'before' as well as --before"),
        (["--after", "=x"], "'=x' names no system or no folder"),
        (["--after", "x="], "'x=' names no system or no folder"),
        (["--after", "before={split}"], "a system 'before' as well as --before"),
        (["--after", "{before}", "--figure", "{before}/x.svg"], "--figure draws a PNG"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    folders = {"before": write(tmp_path / "before", (1, 3, 2, 10)), "none": tmp_path / "none"}
    folders["split"] = write(tmp_path / "split", (1, 3, 2, 10), split="validation")
    folders["other"] = write(tmp_path / "other", (10, 2, 3, 1), users="wvuu")
    with pytest.raises(SystemExit) as caught:
        compare(monkeypatch, "--before", folders["before"], *(word.format(**folders) for word in words))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and sentence.format(**folders) in error and error.count("\n") == 1


def test_a_cutoff_with_a_leading_zero(tmp_path, monkeypatch, capsys):
    before, after = write(tmp_path / "before", (1, 3, 2, 10)), write(tmp_path / "after", (1, 1, 1, 10))
    compare(monkeypatch, "--before", before, "--after", after, "--metrics", "ndcg@010")
    assert "NDCG@010" in capsys.readouterr().out
