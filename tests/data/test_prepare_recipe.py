"""recipes/prepare_data.py as a user runs it: folders, audits, one-sentence errors, nothing left behind."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r2ec_trl.data import load_dataset_card, load_dataset_folder
from r2ec_trl.data.generate import generate_amazon

ROOT = Path(__file__).resolve().parents[2]
RATINGS = "user_id,item_id,rating,timestamp\n" + "".join(
    f"u{user},i{(user + at) % 7},{at % 5 + 1},{100 * user + 10 * at}\n" for user in range(9) for at in range(6)
)


def recipe(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "prepare_data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **environment},
    )


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def prepare_in_process(monkeypatch, capsys):
    """The recipe's main in this process (a second each is saved); returns exit status and stderr."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import prepare_data

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            prepare_data.run(prepare_data.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call


def test_same_bytes_whatever_the_hash_seed_and_the_threads(tmp_path):
    generate_amazon(tmp_path / "raw", 3_000, 200, 90, kind="csv.gz")
    arguments = ["--source", "amazon", "--amazon_category", "Generated", "--input", tmp_path / "raw", "--k_core", 5]
    one = recipe(*arguments, "--output", tmp_path / "one", PYTHONHASHSEED="1", POLARS_MAX_THREADS="1")
    two = recipe(*arguments, "--output", tmp_path / "two", PYTHONHASHSEED="2", POLARS_MAX_THREADS="4")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(load_dataset_folder(tmp_path / "one")["test"]) == 200
    assert "leakage" in one.stdout and "LEAK" not in one.stdout


def test_card_and_check(tmp_path, prepare_in_process):
    (tmp_path / "t.csv").write_text(RATINGS)
    output = tmp_path / "deep" / "folder"
    status, text = prepare_in_process("--source", "table", "--input", tmp_path / "t.csv", "--output", output)
    assert status == 0, text
    card = load_dataset_card(output)
    assert card["counts"] == {"train": 27, "validation": 9, "test": 9, "items": 7}
    assert card["facts"]["interactions"] == 54 and card["settings"]["split"] == "leave_one_out"
    assert card["dropped"] == {"too little history to be a target (stays in histories)": 9}
    assert card["audit"]["splits"]["test"]["rows"] == 9
    assert str(tmp_path) not in json.dumps(card)
    assert [path.name for path in output.parent.iterdir()] == ["folder"]
    assert prepare_in_process("--check", output)[0] == 0
    status, text = prepare_in_process("--source", "table", "--input", tmp_path / "t.csv", "--output", output)
    assert status == 2 and "exists already" in text


def test_check_fails_on_leakage(tmp_path, prepare_in_process):
    rows = [("u", at, 1 + at, "train") for at in range(4)] + [("u", 1, 2, "test"), ("v", 1, 1, "train")]
    rows += [("v", 2, 2, "validation"), ("v", 3, 3, "test")]
    table = "user_id,item_id,timestamp,split\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "t.csv").write_text(table.replace("u,1,2,test", "u,0,2,test"))
    arguments = ["--source", "table", "--input", tmp_path / "t.csv", "--split", "given", "--split_column", "split"]
    status, text = prepare_in_process(*arguments, "--output", tmp_path / "folder")
    assert status == 0 and "LEAK" in text
    status, text = prepare_in_process("--check", tmp_path / "folder")
    assert status == 2 and "is not sound: 2 train rows later than a held-out target of the same user" in text


def test_the_papers_config_is_read_from_anywhere(tmp_path, prepare_in_process, monkeypatch):
    """The counts that it names lie beside it, wherever the command is given."""
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "recipes" / "configs" / "data_paper.yaml"
    words = ["--config", config, "--amazon_category", "Video_Games", "--input", tmp_path, "--output", "games"]
    status, text = prepare_in_process(*words, "--category", "video game")
    assert status == 2 and "has no Video_Games.csv" in text
    status, text = prepare_in_process(*words, "--category", "video game", "--published_counts", "none.yaml")
    assert status == 2 and "--published_counts none.yaml cannot be read" in text


def test_published_counts_are_compared(tmp_path, prepare_in_process):
    generate_amazon(tmp_path / "raw", 3_000, 200, 90, kind="jsonl.gz")
    (tmp_path / "counts.yaml").write_text("Generated: {users: 200, items: 80, test: 100}\n")
    arguments = ["--source", "amazon", "--amazon_category", "Generated", "--input", tmp_path / "raw"]
    arguments += ["--reviews", "raw", "--published_counts", tmp_path / "counts.yaml", "--output", tmp_path / "folder"]
    status, text = prepare_in_process(*arguments, "--max_items", 40, "--max_users", 150)
    assert status == 0, text
    card = load_dataset_card(tmp_path / "folder")
    assert card["published"]["test"] == {"published": 100, "here": card["counts"]["test"]}
    assert card["counts"]["items"] == 40 and card["dropped"]["cut: item"] == 50
    assert card["facts"].keys() == {"before the cut"} and card["facts"]["before the cut"]["items"] == 90
    assert card["published"]["users"] == {"published": 200, "here": card["audit"]["users"]}
    assert card["settings"]["max_items"] == 40 and card["settings"]["max_users"] == 150
    assert "against the published counts" in text
    (tmp_path / "counts.yaml").write_text("Generated: {users: 200, users: 80}\n")
    status, text = prepare_in_process(*arguments[:-1], tmp_path / "again")
    assert status == 2 and "'users' stands twice" in text and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--source", "table"], "--source and --output are needed"),
        (["--source", "table", "--output", "OUT"], "--source table needs --input"),
        (["--source", "amazon", "--output", "OUT"], "needs --amazon_category, such as Video_Games"),
        (["--source", "amazon", "--amazon_category", "X", "--input", "IN", "--output", "OUT"], "has no X.csv"),
        (["--source", "recbole", "--input", "IN", "--output", "OUT"], "holds no .inter file"),
        (["--source", "movielens", "--input", "IN", "--output", "OUT"], "has no u.data"),
        (["--source", "sequences", "--input", "IN", "--output", "OUT"], "has no file items.jsonl|has no file train"),
        (["--source", "table", "--input", "IN/none.csv", "--output", "OUT"], "none.csv cannot be opened"),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--k_core", "50"], "Nothing is left of 54"),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--user_column", "x"], "has no column 'x'"),
        (
            ["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--item_fields", "x"],
            "names 'x', which the",
        ),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--window_end", "1960-01-01"], "move it"),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--split", "given"], "split already"),
        (["--source", "table", "--input", "IN/bad.csv.gz", "--output", "OUT"], "bad.csv.gz is damaged after row"),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--max_items", "0"], "The cut leaves no row"),
        (["--source", "table", "--input", "IN/t.csv", "--output", "OUT", "--sauce", "x"], "unknown flag '--sauce'"),
        (["--check", "OUT"], "There is no dataset folder"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, prepare_in_process, arguments, sentence):
    import re

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.csv").write_text(RATINGS)
    (tmp_path / "in" / "bad.csv.gz").write_bytes(gzip.compress(RATINGS.encode())[:-60])
    named = [word.replace("OUT", str(tmp_path / "out")).replace("IN", str(tmp_path / "in")) for word in arguments]
    status, text = prepare_in_process(*named)
    assert status == 2 and re.search(sentence, text), text
    assert text.strip().count("\n") == 0 and "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_skipped_rows_are_counted(tmp_path, prepare_in_process):
    (tmp_path / "t.csv").write_text(RATINGS + "u0,i1,bad,5\nu0,i1,5,-5\n")
    arguments = ["--source", "table", "--input", tmp_path / "t.csv", "--output", tmp_path / "folder"]
    status, text = prepare_in_process(*arguments)
    assert status == 2 and "row 55 has a rating that is no number" in text
    assert prepare_in_process(*arguments, "--skip_bad_rows")[0] == 0
    dropped = load_dataset_card(tmp_path / "folder")["dropped"]
    assert dropped["row that has a rating that is no number"] == dropped["row that has a negative timestamp"] == 1


def test_starts_without_torch():
    code = "import sys; sys.path.insert(0, 'recipes'); import prepare_data; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
