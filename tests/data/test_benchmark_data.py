"""recipes/benchmark.py: finds its cases, checks parity before it times, ends with one JSON line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*words):
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_data_case_in_small():
    done = benchmark("--case", "data", "--rows", "4000", "--large_rows", "4000")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (comparison,) = result["comparisons"]
    assert comparison["parity"] is True and comparison["ratio"] > 0 and comparison["runs_of_each"] == 2
    assert 380 < result["large"]["test"] <= 400 and result["large"]["peak_gib"] > 0


@pytest.mark.slow
def test_parity_is_checked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import datasets
    from benchmarks import data

    from r2ec_trl.data.generate import generate_amazon
    from r2ec_trl.errors import UserError

    raw = generate_amazon(tmp_path / "raw", 2_000, 200, 100, kind="csv.gz")
    data.ours(raw, tmp_path / "fast")
    data.twin(raw, tmp_path / "slow")
    data.check_parity(tmp_path / "fast", tmp_path / "slow")
    changed = datasets.load_from_disk(str(tmp_path / "slow"))
    changed["test"] = changed["test"].map(lambda row: {"target": "B000000001"})
    changed.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="differ in column 'target' of 'test': no timing is given"):
        data.check_parity(tmp_path / "fast", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["item_table", "--num_items", "40"],
        ["generate", "--users", "1", "--generations", "4", "--prompt_tokens", "20", "--new_tokens", "8"],
        ["score", "--num_items", "20000"],
    ],
)
def test_other_cases_in_small(words):
    done = benchmark("--case", *words, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(comparison["parity"] and comparison["ratio"] > 0 for comparison in result["comparisons"])
    assert words[0] != "item_table" or result["waste"][0] < 1.05 + 28 / 40  # a catalogue this small fills few batches
