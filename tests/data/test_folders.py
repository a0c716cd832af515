"""Dataset folders under attack and accident: names that point outside, bits that flip, kills, full disks, races."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from r2ec_trl.data import load_dataset_card, load_dataset_folder, save_dataset_folder
from r2ec_trl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CARD = {"source": "x", "category": "thing", "category_plural": "things", "dropped": {}, "split_rule": "given"}
CARD |= {"synthetic": True}


def small(users=20):
    rows = {
        "user_id": [f"u{n}" for n in range(users)],
        "history": [[f"i{n % 7}", f"i{(n + 1) % 7}"] for n in range(users)],
        "target": [f"i{(n + 2) % 7}" for n in range(users)],
        "history_ratings": [[1.0, 2.5]] * users,
        "history_timestamps": [[1, 2]] * users,
        "timestamp": [3] * users,
    }
    items = {"item_id": [f"i{n}" for n in range(7)], "title": [f"Thing {n}" for n in range(7)]}
    splits = {split: Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    return DatasetDict(**splits, items=Dataset.from_dict(items))


@pytest.fixture
def folder(tmp_path):
    save_dataset_folder(small(), tmp_path / "folder", CARD)
    return tmp_path / "folder"


def without_digests(folder):
    """The card as folders of other programs have it: nothing is hashed, all is validated."""
    card = json.loads((folder / "dataset_card.json").read_text())
    for key in ("files", "card_sha256"):
        del card[key]
    (folder / "dataset_card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "name", ["../../secret/x.arrow", "../train/../../../secret/x.arrow", "/ABSOLUTE/secret/x.arrow"]
)
@pytest.mark.parametrize("digests", [True, False])
def test_a_name_that_points_outside_is_not_read(folder, tmp_path, name, digests):
    (tmp_path / "secret").mkdir()
    (arrow,) = (folder / "train").glob("*.arrow")
    shutil.copy(arrow, tmp_path / "secret" / "x.arrow")
    state = json.loads((folder / "train" / "state.json").read_text())
    state["_data_files"] = [{"filename": name.replace("/ABSOLUTE", str(tmp_path))}]
    (folder / "train" / "state.json").write_text(json.dumps(state))
    if not digests:
        without_digests(folder)
    with pytest.raises(UserError, match="is damaged" if digests else "which is outside the folder"):
        load_dataset_folder(folder)


@pytest.mark.parametrize("what", ["train", "test/state.json", "items"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, what):
    without_digests(folder)
    shutil.move(folder / what, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / what)
    with pytest.raises(UserError, match="which is outside the folder"):
        load_dataset_folder(folder)


def test_a_link_to_the_folder_is_followed(folder, tmp_path):
    os.symlink(folder, tmp_path / "link")
    assert len(load_dataset_folder(tmp_path / "link")["test"]) == 20


@pytest.mark.parametrize("file", ["train/state.json", "dataset_card.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"_data_files": 5}', '{"_data_files": [5]}', "[" * 100_000]
)
def test_json_of_another_shape_is_one_sentence(folder, file, content):
    without_digests(folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        load_dataset_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "key, value", [("category", 5), ("dropped", []), ("synthetic", "no"), ("files", 3), ("facts", "x")]
)
def test_cards_of_wrong_types_are_one_sentence(folder, key, value):
    without_digests(folder)
    card = json.loads((folder / "dataset_card.json").read_text()) | {key: value}
    (folder / "dataset_card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"'{key}' holds .*, which is no .*: mend the card"):
        load_dataset_card(folder)


def test_an_edited_card_is_told(folder):
    file = folder / "dataset_card.json"
    file.write_text(file.read_text().replace('"thing"', '"think"'))
    with pytest.raises(
        UserError, match="is damaged or was edited .* delete its line 'card_sha256' if the change is yours"
    ):
        load_dataset_folder(folder)
    card = json.loads(file.read_text())
    del card["card_sha256"]
    file.write_text(json.dumps(card))
    assert load_dataset_card(folder)["category"] == "think" and len(load_dataset_folder(folder)["test"]) == 20


def test_nothing_is_strewn_into_a_folder(folder):
    before = sorted(folder.rglob("*"))
    dataset = load_dataset_folder(folder)["train"].map(lambda row: {"length": len(row["history"])})
    dataset = dataset.filter(lambda row: row["length"] == 2).sort("user_id")
    assert len(dataset) == 20 and sorted(folder.rglob("*")) == before and not dataset.cache_files


@pytest.mark.parametrize(
    "column, value, sentence",
    [
        ("history_ratings", [1.0, float("nan")], "history_ratings holds no number"),
        ("history_timestamps", [1, 10**12], "history_timestamps is no time in whole seconds"),
        ("timestamp", -5, "has a timestamp that is no time in whole seconds"),
    ],
)
def test_values_that_are_none(tmp_path, column, value, sentence):
    dataset = small(2)
    rows = dataset["test"].to_dict()
    rows[column] = [rows[column][0], value]
    dataset["test"] = Dataset.from_dict(rows)
    with pytest.raises(UserError, match=f"split 'test', row 1.*{sentence}"):
        save_dataset_folder(dataset, tmp_path / "folder", CARD)
    assert not list(tmp_path.iterdir())


LOG = "user_id,item_id,rating,timestamp\n" + "".join(
    f"u{user},i{(user + at) % 7},{at % 5 + 1},{100 * user + 10 * at}\n" for user in range(900) for at in range(6)
)


def start(output, log, **more):
    words = [ROOT / "recipes" / "prepare_data.py", "--source", "table", "--input", log, "--output", output]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT)}, **settings
    )


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    import resource

    (tmp_path / "log.csv").write_text(LOG)
    out = tmp_path / "out"
    out.mkdir()
    for limit in (3_000, 40_000):

        def small_disk(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = start(out / "folder", tmp_path / "log.csv", preexec_fn=small_disk)
        _, said = done.communicate(timeout=120)
        assert done.returncode == 2 and "cannot be written" in said and said.strip().count("\n") == 0, said
        assert not list(out.iterdir())


@pytest.mark.slow
def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    for place in ("/proc/folder", tmp_path / "log.csv" / "folder", "/dev/full/folder"):
        done = start(place, tmp_path / "log.csv")
        _, said = done.communicate(timeout=120)
        assert done.returncode == 2 and "cannot be written" in said and said.strip().count("\n") == 0, said


@pytest.mark.slow
def test_two_writers_of_one_folder(tmp_path):
    """One wins; the other says in one sentence that the folder is there."""
    (tmp_path / "log.csv").write_text(LOG)
    both = [start(tmp_path / "out" / "folder", tmp_path / "log.csv") for _ in range(2)]
    said = [done.communicate(timeout=200)[1] for done in both]
    assert sorted(done.returncode for done in both) == [0, 2], said
    (sentence,) = [text for text, done in zip(said, both) if done.returncode]
    assert sentence.strip().count("\n") == 0 and ("exists" in sentence), sentence
    assert len(load_dataset_folder(tmp_path / "out" / "folder")["test"]) == 900
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["folder"]


@pytest.mark.slow
def test_killed_at_any_moment_the_folder_is_absent_or_whole(tmp_path):
    """Twelve kills; what they leave is gone after the next start."""
    (tmp_path / "log.csv").write_text(LOG)
    out, dice = tmp_path / "out", random.Random(0)
    begun = time.monotonic()
    assert start(out / "first", tmp_path / "log.csv").wait(timeout=200) == 0
    shortest = time.monotonic() - begun  # the first run reads the libraries from the disk: later ones are quicker
    killed = 0
    for turn in range(60):
        name, begun = out / f"folder{turn}", time.monotonic()
        done = start(name, tmp_path / "log.csv", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            done.wait(timeout=shortest * dice.uniform(0.4, 1.0))
            shortest = min(shortest, time.monotonic() - begun)
        except subprocess.TimeoutExpired:
            done.kill()
            killed += done.wait(timeout=60) == -signal.SIGKILL
        if name.exists():
            assert len(load_dataset_folder(name)["test"]) == 900
        if killed == 12:
            break
    assert start(out / "last", tmp_path / "log.csv").wait(timeout=200) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")] and killed == 12


@pytest.mark.slow
@pytest.mark.parametrize("digests", [True, False])
def test_flipped_bits_are_refused_or_harmless(folder, tmp_path, digests):
    """Two hundred one-bit flips, each alone, tried in processes whose death would be seen."""
    if not digests:
        without_digests(folder)
    code = f"""
import random, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from r2ec_trl.data import load_dataset_card, load_dataset_folder
from r2ec_trl.data.audit import audit_dataset
from r2ec_trl.errors import UserError
folder = Path({str(folder)!r})
files = sorted(path for path in folder.rglob("*") if path.is_file())
def look():
    dataset, card = load_dataset_folder(folder), load_dataset_card(folder)
    audit_dataset(dataset)
    return {{split: rows.to_list() for split, rows in dataset.items()}}, card["category"], card["category_plural"]
right, dice, counts = look(), random.Random(int(sys.argv[1])), {{"refused": 0, "right": 0, "wrong": 0}}
for turn in range(100):
    file = dice.choice(files)
    data = bytearray(old := file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    try:
        counts["right" if look() == right else "wrong"] += 1
    except UserError as error:
        assert "\\n" not in str(error)
        counts["refused"] += 1
    file.write_bytes(old)
    print(turn, counts, flush=True)
"""
    for seed in (1, 2):
        done = subprocess.run([sys.executable, "-c", code, str(seed)], capture_output=True, text=True, timeout=300)
        last = done.stdout.strip().splitlines()[-1:]
        assert done.returncode == 0 and last[0].startswith("99 "), (done.returncode, last, done.stderr[-2000:])
        if digests:
            assert "'wrong': 0" in last[0], last
        print(digests, last)


@pytest.mark.parametrize(
    "key, value", [("sha256", None), ("sha256", {}), ("counts", None), ("counts", {"items": "9"})]
)
def test_a_card_without_what_results_repeat_is_one_sentence(folder, key, value):
    without_digests(folder)
    card = json.loads((folder / "dataset_card.json").read_text())
    (folder / "dataset_card.json").write_text(
        json.dumps({name: one for name, one in {**card, key: value}.items() if one is not None})
    )
    with pytest.raises(UserError, match=f"'{key}' does not hold all of train, validation, test, items"):
        load_dataset_card(folder)
