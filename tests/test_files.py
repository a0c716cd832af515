"""One atomic writer: whole or not at all, whoever dies, whoever else writes."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from r2ec_trl import files
from r2ec_trl.errors import UserError
from r2ec_trl.files import (
    build_folder,
    lock_folder,
    remove_folder,
    remove_leftovers,
    write_json,
    write_text,
    write_with,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "ä\n")
    write_with(tmp_path / "new" / "a.txt", lambda path: path.write_bytes(b"\x00"))
    write_json(tmp_path / "new" / "a.json", {"ä": 0.1})
    write_with(tmp_path / "new" / "rows.safetensors", lambda path: save_file({"rows": torch.ones(2)}, path))
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\x00"
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"ä": 0.1}
    assert names(tmp_path / "new") == ["a.json", "a.txt", "rows.safetensors"]
    with pytest.raises(UserError, match="a figure in it is NaN"):
        write_json(tmp_path / "new" / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"ä": 0.1}


def test_a_failed_write_changes_nothing(tmp_path):
    write_text(tmp_path / "a", "old")

    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_is_swapped_in_whole(tmp_path):
    with build_folder(tmp_path / "deep" / "folder") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    with pytest.raises(UserError, match="'.*folder' cannot be written .File exists.: remove it first"):
        with build_folder(tmp_path / "deep" / "folder") as scratch:
            (scratch / "b").write_text("2")
    assert names(tmp_path / "deep" / "folder") == ["a"]
    with build_folder(tmp_path / "deep" / "folder", replace=True) as scratch:
        (scratch / "b").write_text("2")
    assert names(tmp_path / "deep" / "folder") == ["b"] and names(tmp_path / "deep") == ["folder"]


def test_a_folder_can_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors writes 0600: a server that runs as another user could not read a bundle."""
    old = os.umask(0o027)
    try:
        with build_folder(tmp_path / "made") as scratch:
            save_file({"x": torch.ones(1)}, scratch / "x.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "made" / "x.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("moment", ["block", 1, 2])
def test_a_failed_folder_changes_nothing(tmp_path, monkeypatch, error, moment):
    """In the block, at renaming the old one away, and at renaming the new one in."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    calls, rename = [], os.rename

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == moment:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(UserError if error is OSError else error):
        with build_folder(tmp_path / "folder", replace=True) as scratch:
            (scratch / "half").write_text("")
            if moment == "block":
                raise error
    assert names(tmp_path / "folder") == ["old"] and names(tmp_path) == ["folder"]


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "rename", lambda *args: (synced.append("rename"), rename(*args)))
    with build_folder(tmp_path / "folder") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a").write_text("1")
    parts = [path.replace(str(scratch), "").replace(str(tmp_path), "parent") for path in synced]
    assert set(parts[:3]) == {"", "/sub", "/sub/a"} and parts[3:] == ["rename", "parent"]


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device.: free some space, or choose another place"),
        (OSError(errno.EROFS, "x"), "Read-only file system.: see that you may write there"),
        (PermissionError(errno.EACCES, "x"), "Permission denied.: see that you may write there"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, error, sentence):
    def fail(*args, **kwargs):
        raise error

    with pytest.raises(UserError, match=sentence):
        write_with(tmp_path / "a", fail)
    monkeypatch.setattr(Path, "mkdir", fail)
    for write in (lambda: write_text(tmp_path / "b" / "a", ""), lambda: build_folder(tmp_path / "c").__enter__()):
        with pytest.raises(UserError, match=sentence) as caught:
            write()
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_full_disk_under_safetensors_is_one_sentence(tmp_path):
    def fail(path):
        words = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(words)

    with pytest.raises(UserError, match=r"rows' cannot be written \(No space left on device\): free some space"):
        write_with(tmp_path / "rows", fail)
    with pytest.raises(UserError, match="a/b' cannot be written .File exists: .*/a.: remove it first"):
        write_text(tmp_path / "a", "")
        write_text(tmp_path / "a" / "b", "")


# ------------------------------------------------------------------ leftovers and the lock
def die(folder, kind):
    """A process that dies while it holds scratch and the lock."""
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom r2ec_trl import files\n"
        "lock = files.lock_folder(sys.argv[1])\nlock.__enter__()\n"
        "files._scratch(Path(sys.argv[1], 'part'), sys.argv[2]).mkdir()\n"
        "(files._scratch(Path(sys.argv[1], 'text'), sys.argv[2])).write_text('')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder, kind]).returncode == -9


def test_what_the_dead_leave_is_removed(tmp_path):
    die(tmp_path, "unfinished")
    alive = files._scratch(tmp_path / "part", "unfinished")
    alive.mkdir()
    (tmp_path / ".hidden").write_text("a user's own")
    assert len(names(tmp_path)) == 5
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([".hidden", ".lock", alive.name])
    with lock_folder(tmp_path, timeout=0):  # the lock of the dead is free
        pass
    assert names(tmp_path) == sorted([".hidden", alive.name])


def test_the_next_write_removes_what_the_dead_left(tmp_path):
    die(tmp_path, "unfinished")
    write_text(tmp_path / "new", "x")
    assert names(tmp_path) == [".lock", "new"]


def test_a_reused_process_number_does_not_fool_it(tmp_path):
    mine = files._scratch(tmp_path / "a", "unfinished").name
    pid, started, rest = mine.split("unfinished-")[1].split("-", 2)
    (tmp_path / f".a.unfinished-{pid}-{int(started) - 1}-{rest}").mkdir()
    (tmp_path / mine).mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [mine]


def test_scratch_of_another_machine_is_left_alone_for_a_week(tmp_path):
    name = files._scratch(tmp_path / "a", "unfinished").name.replace(files._host(), "01234567")
    (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [name]
    os.utime(tmp_path / name, (0, time.time() - 8 * 86_400))
    remove_leftovers(tmp_path)
    assert not names(tmp_path)


def test_a_folder_whose_owner_died_between_two_renames_comes_back(tmp_path):
    die(tmp_path, "replaced")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "part", "text"]
    die(tmp_path, "replaced")
    remove_leftovers(tmp_path)  # its name is taken again: this one was about to be deleted
    assert names(tmp_path) == [".lock", "part", "text"]


def test_a_removed_folder_never_stands_half_deleted(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **kwargs: None)  # died here
    remove_folder(tmp_path / "folder")
    remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and len(names(tmp_path)) == 1


def test_who_has_ended_and_is_not_waited_for_is_gone_too(tmp_path):
    """A zombie still has its number and its start in /proc."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = files._scratch(tmp_path / "a", "unfinished").name
    pid, started = f"-{os.getpid()}-", f"-{files._started(os.getpid())}-"
    name = mine.replace(pid + started[1:], f"-{child.pid}-{files._started(child.pid)}-")
    (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [name]
    child.stdin.close()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    remove_leftovers(tmp_path)
    assert not names(tmp_path)
    child.wait()


def test_a_lock_that_its_last_owner_deleted_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking the file was deleted: another may hold a new one of that name."""
    real, calls = files.fcntl.flock, []

    def flock(handle, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return real(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with lock_folder(tmp_path):
        assert len(calls) == 2 and names(tmp_path) == [".lock"]
        with pytest.raises(UserError, match="is being changed by"):
            lock_folder(tmp_path, timeout=0).__enter__()
    assert not names(tmp_path)


def test_the_owner_of_a_lock_is_named(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match=f"is being changed by process {os.getpid()} on .* within 0.1 seconds"):
            lock_folder(tmp_path, timeout=0.1).__enter__()
    with pytest.raises(UserError, match="nowhere' cannot be written .No such file"):
        lock_folder(tmp_path / "nowhere").__enter__()


def count(folder, times):
    for _ in range(times):
        with lock_folder(folder):
            number = int((folder / "number").read_text())
            with build_folder(folder, replace=True) as scratch:
                (scratch / "number").write_text(str(number + 1))


def test_no_change_is_lost_between_processes_and_threads(tmp_path):
    """Each reads, adds one, and replaces the whole folder, lock file and all."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [kind(target=count, args=(folder, 20)) for kind in (context.Process, threading.Thread) * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert (folder / "number").read_text() == "80"
    assert names(tmp_path) == ["folder"] and names(folder) == ["number"]


def test_what_is_written_is_on_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    """After a power cut a name without its content is worse than no name."""
    events, sync = [], os.fsync

    def renaming(name):
        inner = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *places: (events.append("named"), inner(*places))[1])

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), sync(handle)))
    renaming("replace")
    renaming("rename")
    write_text(tmp_path / "text", "x")
    place = tmp_path.stat().st_ino
    assert events == [(tmp_path / "text").stat().st_ino, "named", place]
    events.clear()
    with build_folder(tmp_path / "folder") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").touch()
    inside = {path.stat().st_ino for path in (tmp_path / "folder", *(tmp_path / "folder").rglob("*"))}
    assert set(events[:-2]) == inside and events[-2:] == ["named", place]
