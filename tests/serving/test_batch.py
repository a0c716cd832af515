"""A file of users: each once, whatever is killed, by any number of processes, in memory that does not grow."""

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.errors import UserError
from r2ec_trl.serving.batch import recommend_file
from r2ec_trl.serving.recommender import Recommender

ROOT = Path(__file__).parents[2]


def write_users(path, ids, count):
    draw = random.Random(count)
    users = [{"user_id": f"u{n}", "history": draw.sample(ids, draw.randint(0, 5))} for n in range(count)]
    path.write_text("".join(json.dumps(user) + "\n" for user in users), encoding="utf-8")
    return users


def parts(folder):
    return pl.concat([pl.read_parquet(path) for path in sorted(Path(folder).glob("part-*.parquet"))])


def check_answers(frame, users, library, **options):
    """Each user once and in order, with the library's own answer."""
    assert frame["row"].to_list() == list(range(len(users)))
    for row, result in zip(frame.iter_rows(named=True), library.recommend(users, **options), strict=True):
        assert row["item_ids"] == [item.item_id for item in result.items]
        assert row["scores"] == pytest.approx([item.score for item in result.items], abs=1e-5)
        assert (row["reasoning"], row["user_id"]) == (result.reasoning, result.user_id)
        assert (row["has_marker"], row["reasoning_tokens"]) == (result.has_marker, result.reasoning_tokens)


def test_every_user_once_and_as_the_library_says(library, tmp_path):
    users = write_users(tmp_path / "users.jsonl", library.bundle.table.item_ids, 23)
    summary = recommend_file(library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"), 5, k=3)
    assert (summary["users"], summary["answered_now"], summary["errors_now"]) == (23, 23, 0)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 5
    check_answers(parts(tmp_path / "out"), users, library, k=3)
    pl.DataFrame(users).write_parquet(tmp_path / "users.parquet", row_group_size=7)
    recommend_file(library, str(tmp_path / "users.parquet"), str(tmp_path / "same"), 5, k=3)
    assert parts(tmp_path / "same").equals(parts(tmp_path / "out"))


def test_it_goes_on_where_it_stopped(library, tmp_path, monkeypatch):
    write_users(tmp_path / "users.jsonl", library.bundle.table.item_ids, 23)
    arguments = (library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"), 5)
    answer, count = Recommender.answer, []

    def dies(self, questions, watch=None):
        count.append(len(questions))
        if len(count) == 3:
            raise KeyboardInterrupt
        return answer(self, questions, watch)

    monkeypatch.setattr(Recommender, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        recommend_file(*arguments)
    assert parts(tmp_path / "out").height == 10
    assert recommend_file(*arguments)["answered_now"] == 13
    assert count == [5, 5, 5, 5, 5, 3]
    assert parts(tmp_path / "out")["row"].to_list() == list(range(23))
    assert recommend_file(*arguments)["answered_now"] == 0


def test_only_missing_parts_are_dealt_out(library, tmp_path, monkeypatch):
    """The second of two processes takes the second part that is missing, whichever number it has."""
    write_users(tmp_path / "users.jsonl", library.bundle.table.item_ids, 10)
    arguments = (library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"), 2)
    recommend_file(*arguments)
    first, second = (tmp_path / "out" / f"part-00000{number}.parquet" for number in (0, 2))
    first.unlink(), second.unlink()
    state = SimpleNamespace(is_main_process=True, num_processes=2, process_index=1, wait_for_everyone=lambda: None)
    monkeypatch.setattr("r2ec_trl.serving.batch.Accelerator", lambda: state)
    with pytest.raises(UserError, match="holds 4 of 5 parts"):
        recommend_file(*arguments)
    assert second.exists() and not first.exists()


@pytest.mark.parametrize("options", [{"where": "prize < 50"}, {"allow": ["nope"]}, {"k": 0}])
def test_a_mistake_in_an_option_is_one_sentence_and_writes_nothing(library, tmp_path, options):
    write_users(tmp_path / "users.jsonl", library.bundle.table.item_ids, 4)
    with pytest.raises(UserError, match="prize|nope|`k` is 0"):
        recommend_file(library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_recommender_that_was_never_saved_is_told_from_another(make_bundle_folder, tmp_path):
    """By its weights, its items and its settings; the same one goes on."""
    folder = make_bundle_folder()

    def unsaved(weight=1.0, brand=None, **protocol):
        bundle = Bundle.load(folder)
        with torch.no_grad():
            next(p for name, p in bundle.model.named_parameters() if "lora_B" in name).mul_(weight)
        bundle.folder = None  # as `--adapter A --dataset D` makes it: in memory, and without hashes
        if brand is not None:
            bundle.update_items([{"item_id": "i00", "brand": brand}])
        protocol = dataclasses.replace(bundle.meta.protocol, **protocol)
        bundle.meta = dataclasses.replace(bundle.meta, hashes={}, protocol=protocol)
        return Recommender(bundle)

    write_users(tmp_path / "users.jsonl", ["i00", "i01", "i02", "i03", "i04", "i05"], 4)
    arguments = (str(tmp_path / "users.jsonl"), str(tmp_path / "out"), 2)
    recommend_file(unsaved(), *arguments)
    assert recommend_file(unsaved(), *arguments)["answered_now"] == 0
    for other in (unsaved(weight=1.01), unsaved(brand="new"), unsaved(max_completion_length=7)):
        with pytest.raises(UserError, match="was begun with another hashes"):
            recommend_file(other, *arguments)


def test_another_question_does_not_mix_with_the_first(library, tmp_path):
    source, folder = tmp_path / "users.jsonl", str(tmp_path / "out")
    write_users(source, library.bundle.table.item_ids, 4)
    recommend_file(library, str(source), folder, 2)
    for options, what in (
        ({"part_users": 3}, "part_users"),
        ({"k": 3}, "options"),
        ({"where": "price < 9"}, "options"),
    ):
        with pytest.raises(UserError, match=f"was begun with another {what}"):
            recommend_file(library, str(source), folder, **{"part_users": 2, **options})
    with pytest.raises(UserError, match="was begun with another engine"):
        recommend_file(Recommender(library.bundle, engine=object()), str(source), folder, 2)
    source.write_text(source.read_text() + '["i00"]\n')
    with pytest.raises(UserError, match="was begun with another sha256"):
        recommend_file(library, str(source), folder, 2)
    with pytest.raises(UserError, match="is not empty and holds no plan.json"):
        recommend_file(library, str(source), str(tmp_path), 2)
    with pytest.raises(UserError, match="cannot be read"):
        recommend_file(library, str(tmp_path / "none.jsonl"), str(tmp_path / "new"), 2)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        recommend_file(library, str(tmp_path / "bad.parquet"), str(tmp_path / "new"), 2)


def test_who_cannot_be_answered_is_counted_and_told_why(library, tmp_path):
    good = json.dumps([library.bundle.table.item_ids[0]])
    long = json.dumps({"history_titles": ["word " * 5_000]})  # longer than any prompt may be
    lines = [good, '{"history": ["nope"]}', "{", "", "3", '{"history": []}', "\x1b[2J", "[" * 10_000, good, long]
    lines += [json.dumps({"user_id": "\ud800", "history": ["i00"]}), good]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))  # no line end after the last one
    (tmp_path / "latin").write_bytes(b'["\xe9"]\n')
    summary = recommend_file(library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"), 4)
    assert (summary["users"], summary["errors_now"]) == (12, 8)  # no purchases are answered too
    frame = parts(tmp_path / "out")
    assert frame["error"].is_null().to_list() == [True, *[False] * 4, True, False, False, True, False, False, True]
    assert "User 1 bought 'nope'" in frame["error"][1] and "not JSON" in frame["error"][2]
    assert "User 9: the instruction and the newest purchase take" in frame["error"][9]
    assert "User \\ud800: `user_id`" in frame["error"][10]
    assert frame["item_ids"][0].to_list() == frame["item_ids"][8].to_list() == frame["item_ids"][11].to_list()
    recommend_file(library, str(tmp_path / "latin"), str(tmp_path / "two"), 4)
    assert "not JSON" in parts(tmp_path / "two")["error"][0]


def start(folder, source, output, processes, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    recipe = [str(ROOT / "recipes" / "recommend.py"), "--bundle", str(folder), "--input", str(source)]
    command = [sys.executable, *launcher, *recipe, "--output", str(output), *map(str, words)]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.distributed
@pytest.mark.timeout(3000)
def test_killed_three_times_on_two_processes(served_folder, library, tmp_path):
    """Takes R2EC_TRL_USERS users (400) of the bundle."""
    count = int(os.environ.get("R2EC_TRL_USERS", "400"))
    users = write_users(tmp_path / "users.jsonl", library.bundle.table.item_ids, count)
    size = max(10, count // 50)
    for wanted in (3, 17, 31):  # parts at which it is killed
        run = start(served_folder, tmp_path / "users.jsonl", tmp_path / "out", 2, "--part_users", size)
        while len(list((tmp_path / "out").glob("part-*.parquet"))) < wanted and run.poll() is None:
            time.sleep(0.02)
        assert run.poll() is None, run.communicate()
        for process in [run.pid, *_children(run.pid)]:
            os.kill(process, signal.SIGKILL)
        run.wait()
    run = start(served_folder, tmp_path / "users.jsonl", tmp_path / "out", 2, "--part_users", size)
    out, err = run.communicate()
    assert run.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["users"], summary["processes"]) == (count, 2) and 0 < summary["answered_now"] < count
    recommend_file(library, str(tmp_path / "users.jsonl"), str(tmp_path / "unbroken"), size, k=10)
    frame, unbroken = parts(tmp_path / "out"), parts(tmp_path / "unbroken")
    assert frame["row"].to_list() == list(range(count)) and frame["user_id"].to_list() == [u["user_id"] for u in users]
    for name in frame.columns:
        if name != "scores":
            assert frame[name].equals(unbroken[name]), name
    difference = (frame["scores"].explode() - unbroken["scores"].explode()).abs().max()
    print(f"\n{count} users, killed three times: {summary}; largest difference of a score {difference}")
    assert difference < 1e-5
    assert not [path for path in (tmp_path / "out").iterdir() if "unfinished" in path.name]


def _children(parent):
    """The processes that torchrun started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_does_not_grow_with_the_users(served_folder, library, tmp_path):
    """Peak resident memory at R2EC_TRL_MANY users (20,000) is at most 1.2 times that at a tenth; reasoning off."""
    many, peaks = int(os.environ.get("R2EC_TRL_MANY", "20000")), {}
    for count in (many // 10, many):
        source = tmp_path / f"{count}.jsonl"
        write_users(source, library.bundle.table.item_ids, count)
        run = start(served_folder, source, tmp_path / str(count), 1, "--reasoning", "none", "--k", 5)
        run.stdout.read()  # until it ends
        _, status, usage = os.wait4(run.pid, 0)
        assert status == 0, run.stderr.read()
        peaks[count] = usage.ru_maxrss
        seconds = json.loads((tmp_path / str(count) / "summary.json").read_text())["seconds"]
        print(f"\n{count} users: {usage.ru_maxrss / 1024:.0f} MiB, {seconds} s")
    assert peaks[many] <= 1.2 * peaks[many // 10]


def test_users_that_pandas_wrote(library, tmp_path):
    """An index, named or not, is no key of a user, and blanks around a name are none of it."""
    first = library.bundle.table.item_ids[0]
    users = {" history": [[first]], "user_id ": ["u"], "__index_level_0__": [0], "": [1]}
    pl.DataFrame(users).write_parquet(tmp_path / "users.parquet")
    recommend_file(library, str(tmp_path / "users.parquet"), str(tmp_path / "out"), k=3)
    check_answers(parts(tmp_path / "out"), [{"user_id": "u", "history": [first]}], library, k=3)


@pytest.mark.parametrize("data", [b'["i1"]\n'.decode().encode("utf-16"), gzip.compress(b'["i1"]\n', mtime=0), b"PAR1"])
def test_a_file_of_another_kind_is_refused_before_anything_is_written(library, tmp_path, data):
    (tmp_path / "users.jsonl").write_bytes(data)
    with pytest.raises(UserError, match="users.jsonl is (UTF-16|packed by gzip|a parquet file)"):
        recommend_file(library, str(tmp_path / "users.jsonl"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
