"""Damaged, crashed and shared bundles: refused or still right, never a wrong answer, nothing reported done is lost."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bundle_worker import change, save, step
from safetensors.torch import load_file, save_file

from r2ec_trl.bundle import format as bundle_format
from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.format import check_output
from r2ec_trl.bundle.meta import read_meta
from r2ec_trl.errors import UserError

WORKER = Path(__file__).parents[1] / "bundle_worker.py"


def table_of(folder):
    return folder / json.loads((folder / "bundle.json").read_text())["catalogue"] / "item_table.safetensors"


# --------------------------------------------------------------------- damaged bytes
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows * 0,
        lambda rows: rows.index_fill(0, torch.tensor([3]), torch.nan),
        lambda rows: rows.flip(0),
        lambda rows: rows.half(),
        lambda rows: rows[:-1],
    ],
    ids=["zeros", "nan", "permuted", "half", "fewer"],
)
def test_changed_rows_are_refused(own, change):
    """The hashes of what they were made with are kept, as a careful attacker would."""
    from safetensors import safe_open

    with safe_open(table_of(own), framework="pt") as tensors:
        made_with = tensors.metadata()
    rows = change(load_file(table_of(own))["rows"])
    save_file({"rows": rows.contiguous()}, table_of(own), metadata=made_with)
    with pytest.raises(UserError, match="item_table.safetensors is not what was written there: its hash differs"):
        Bundle.load(own)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_never_written(own, value):
    bundle = Bundle.load(own)
    before = (own / "bundle.json").read_bytes()
    bundle._encode = lambda sequences: torch.full((len(sequences), bundle.table.rows.shape[1]), value)
    with pytest.raises(UserError, match="holds NaN or infinite rows"):
        bundle.add_items([{"item_id": "new", "title": "oboe"}])
    assert (own / "bundle.json").read_bytes() == before and len(Bundle.load(own).table) == 40


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "vocab.txt", "additional_chat_templates/x.jinja", "spiece.model"]
)
def test_a_file_that_a_tokenizer_would_read_cannot_be_slipped_in(own, name):
    (own / name).parent.mkdir(exist_ok=True)
    with open(own / name, "a") as file:
        file.write("x")
    with pytest.raises(UserError, match="made with another tokenizer than"):
        Bundle.load(own)


def test_full_weights_keep_their_generation_settings(make_bundle_folder):
    folder = make_bundle_folder(adapter=False)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [5, 6]}))
    with pytest.raises(UserError, match="made with another weights than"):
        Bundle.load(folder)


def test_a_damaged_card_is_no_obstacle(own):
    (own / "README.md").write_bytes(b"---\ntags: {: [\n---\n\xff\xfe")
    Bundle.load(own).remove_items(["i03"])
    assert "## Recommendation" in (own / "README.md").read_text()


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def flips(folder, shop, count, seed):
    """Flip single bits all over a bundle: `(refused, right, wrong)`, where an answer is right if it is as before."""
    expected = Bundle.load(folder).evaluate(shop["test"].select(range(4)))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    draw, result = random.Random(seed), {"refused": 0, "right": 0, "wrong": []}
    for number in range(count):
        file = files[number % len(files)]
        data = file.read_bytes()
        place = draw.randrange(8 * len(data))
        flip(file, place)
        try:
            same = Bundle.load(folder).evaluate(shop["test"].select(range(4))).equals(expected)
            result["right"] += same
            result["wrong"] += [] if same else [(file.name, place)]
        except UserError as error:
            assert "\n" not in str(error), error
            result["refused"] += 1
        file.write_bytes(data)
    return result


def test_a_flipped_bit_is_refused_or_harmless(own, shop):
    result = flips(own, shop, 30, seed=0)
    assert not result["wrong"] and result["refused"] >= 20, result


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
def test_three_hundred_flipped_bits(make_bundle_folder, shop, tmp_path, adapter):
    folder = shutil.copytree(make_bundle_folder(adapter=adapter), tmp_path / "bundle")
    result = flips(folder, shop, 150, seed=1)
    print(result)
    assert not result["wrong"] and result["refused"] >= 100, result


# ------------------------------------------------------------------ one lock, one commit
def test_another_change_is_taken_over_before_mine(own):
    """Two who loaded the same bundle: neither loses the other's items, and what was removed stays removed."""
    one, two = Bundle.load(own), Bundle.load(own)
    one.add_items([{"item_id": "a", "title": "oboe reed"}])
    one.remove_items(["i03"])
    two.add_items([{"item_id": "b", "title": "oboe case"}])
    assert {"a", "b"} <= set(two.table.item_ids) and "i03" not in two.table.item_ids
    fresh = Bundle.load(own)
    assert fresh.table.item_ids == two.table.item_ids and fresh.staleness()["max_drift"] < 1e-6
    with pytest.raises(UserError, match="'b' is in the catalogue already"):
        one.add_items([{"item_id": "b", "title": "oboe case"}])
    one.record_metrics({"note": 1})
    assert Bundle.load(own).meta.metrics == {"note": 1} and len(Bundle.load(own).table) == 41


def test_a_bundle_that_was_replaced_is_not_changed(own, make_bundle_folder):
    bundle = Bundle.load(own)
    Bundle.load(make_bundle_folder(seed=1)).save(own)
    before = (own / "bundle.json").read_bytes()
    with pytest.raises(UserError, match="was replaced since it was loaded; load it again"):
        bundle.remove_items(["i03"])
    assert (own / "bundle.json").read_bytes() == before and Bundle.load(own)


def test_an_old_catalogue_of_the_same_name_is_never_trusted(own, monkeypatch):
    """A half-deleted folder stands under every name that a new catalogue could get but one."""
    bundle = Bundle.load(own)
    names = iter([b"\x00\x00\x00\x00", b"\x00\x00\x00\x01"])
    (own / "catalogue-00000000").mkdir()
    real = os.urandom
    monkeypatch.setattr("r2ec_trl.bundle.format.os.urandom", lambda count: next(names, real(count)))
    with pytest.raises(UserError, match="cannot be written .File exists"):
        bundle.add_items([{"item_id": "a", "title": "oboe reed"}])
    monkeypatch.undo()
    assert len(Bundle.load(own).table) == 40
    bundle.add_items([{"item_id": "a", "title": "oboe reed"}])
    assert len(Bundle.load(own).table) == 41 and len(list(own.glob("catalogue-*"))) == 1


def test_a_loader_meets_a_writer(own):
    """Loading while another process replaces the catalogue gives the old or the new one, never an error."""
    bundle, stop, found = Bundle.load(own), threading.Event(), []

    def read():
        while not stop.is_set():
            found.append(len(Bundle.load(own).table))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(8):
        bundle.add_items([{"item_id": f"n{number}", "title": f"oboe {number}"}])
    stop.set()
    reader.join()
    assert found == sorted(found) and set(found) <= set(range(40, 49)) and found


def test_a_loader_meets_a_bundle_that_takes_its_place(own, make_bundle_folder, monkeypatch):
    """Between its item table and its weights: it is read again, and not for ever."""
    news, load = [Bundle.load(make_bundle_folder(seed=seed)) for seed in (1, 2)], bundle_format.load_policy

    def replace_with(bundles):
        def loads(*args, **more):
            for new in itertools.islice(bundles, 1):
                new.save(own)
            return load(*args, **more)

        monkeypatch.setattr(bundle_format, "load_policy", loads)

    replace_with(iter(news[:1]))
    bundle = Bundle.load(own)
    assert torch.equal(bundle.table.rows, news[0].table.rows) and bundle.staleness()["max_drift"] < 1e-6
    replace_with(itertools.cycle(reversed(news)))
    with pytest.raises(UserError, match="was replaced 5 times while it was read"):
        Bundle.load(own)


def test_figures_are_kept_beside_others_and_with_their_catalogue(own):
    one, two = Bundle.load(own), Bundle.load(own)
    one.record_metrics({"full": 1})
    two.record_metrics({"none": 2})
    assert Bundle.load(own).meta.metrics == {"full": 1, "none": 2}
    one.remove_items(["i03"])
    with pytest.raises(UserError, match="was changed meanwhile, the figures are not its"):
        two.record_metrics({"none": 3})
    assert Bundle.load(own).meta.metrics == {"full": 1, "none": 2}


def test_a_place_that_is_taken_is_found_out_early(own, tmp_path):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "thesis.tex").write_text("x")
    for place in (tmp_path / "stranger", tmp_path / "stranger" / "thesis.tex"):
        with pytest.raises(UserError, match="exists and is no bundle; choose another folder"):
            check_output(place)
    with pytest.raises(UserError, match="cannot be written, because"):
        check_output(tmp_path / "stranger" / "thesis.tex" / "bundle")
    check_output(own)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".lock").write_text("process 1 on a machine")  # all that a save leaves that was killed
    check_output(tmp_path / "killed")
    check_output(tmp_path / "new" / "deep" / "bundle")
    assert not (tmp_path / "new").exists()


def work(*words, **options):
    return subprocess.Popen([sys.executable, WORKER, *map(str, words)], stdout=subprocess.PIPE, text=True, **options)


def done_by(process):
    return [line.split() for line in process.stdout.read().splitlines() if line.startswith("done")]


@pytest.mark.slow
def test_two_writers_with_fifty_changes_each(own):
    writers = [work("change", own, name, 50) for name in ("a", "b")]
    assert [writer.wait(170) for writer in writers] == [0, 0]
    bundle = Bundle.load(own)
    assert set(bundle.table.item_ids) == {f"i{n:02d}" for n in range(40)} | expected_items(
        [entry for writer in writers for entry in done_by(writer)]
    )
    assert bundle.staleness(sample=200)["max_drift"] < 1e-6
    assert not list(own.glob(".*")) and len(list(own.glob("catalogue-*"))) == 1


def expected_items(entries):
    items = set()
    for _, kind, item_id in entries:
        items.add(item_id) if kind == "add" else items.discard(item_id) if kind == "remove" else None
    return items


@pytest.mark.slow
@pytest.mark.parametrize("job", ["change", "save"])
def test_kills_at_random_moments_lose_nothing(own, tmp_path, job):
    """Whatever was reported done before a kill -9 is there; the next start removes what was left."""
    draw, entries, unsure = random.Random(job), [], set()
    target = own if job == "change" else shutil.copytree(own, tmp_path / "saved")
    for number in range(10):
        read, write = os.pipe()
        child = os.fork()  # everything is imported already
        if not child:
            os.dup2(write, 1)
            sys.stdout = os.fdopen(1, "w")
            try:
                change(target, f"k{number}_", 10_000) if job == "change" else save(target, "", 10_000, own)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as lines:
            assert lines.readline() == "loaded\n"
            time.sleep(draw.uniform(0.05, 1.0))
            os.kill(child, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
            done = [line.split() for line in lines if line.startswith("done")]
        bundle = Bundle.load(target)
        assert bundle.staleness()["max_drift"] < 1e-6
        if job == "change":
            entries += done
            unsure.add(step(f"k{number}_", len(done))[1])  # may be done, but was not reported
            expected = expected_items(entries) | {f"i{n:02d}" for n in range(40)}
            assert expected ^ set(bundle.table.item_ids) <= unsure
    bundle.remove_items(["i39"])
    bundle.save(target)
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]
    assert not list(target.glob(".*")) and len(list(target.glob("catalogue-*"))) == 1


def test_the_seal_is_that_of_what_is_read(own):
    meta = read_meta(own)
    assert meta.seal() == meta.hashes["settings"] == read_meta(own).sealed().hashes["settings"]


def test_a_seal_of_before_a_prompt_field_came_holds(own):
    meta = read_meta(own)
    prompts = dataclasses.asdict(meta.prompts)
    older = {name: value for name, value in prompts.items() if name != "no_history"}
    values = {**json.loads((own / "bundle.json").read_text()), "prompts": older}
    values["hashes"]["settings"] = meta.seal(["no_history"])
    (own / "bundle.json").write_text(json.dumps(values))
    assert values["hashes"]["settings"] != meta.seal() and Bundle.load(own).meta.prompts == meta.prompts
    values["prompts"]["no_history"] = "other"
    (own / "bundle.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="differ|other prompts"):
        Bundle.load(own)
