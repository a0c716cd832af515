"""Threads on a CPU: the cores there are under a launcher, the user's own number wherever it was said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r2ec_trl.cli import threads

ROOT = Path(__file__).parents[2]
CODE = "import torch; from r2ec_trl.cli.threads import use_cores; print('said', use_cores(), torch.get_num_threads())"


def launched(tmp_path, flags=(), **environment):
    """What a program says that accelerate launched with these flags and this environment."""
    (tmp_path / "program.py").write_text(CODE)
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *threads.LAUNCHED)}
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        *flags,
        tmp_path / "program.py",
    ]
    done = subprocess.run(
        list(map(str, words)), env={**plain, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )
    return done.stdout.split("said ")[1].strip()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launcher leaves a GPU machine's threads alone")
def test_under_accelerate(tmp_path):
    cores = len(os.sched_getaffinity(0))
    assert launched(tmp_path) == f"{cores} {cores}"
    assert launched(tmp_path, OMP_NUM_THREADS="1") == "None 1"
    assert launched(tmp_path, ["--num_cpu_threads_per_process", "1"]) == "None 1"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *threads.LAUNCHED):
        monkeypatch.delenv(name, raising=False)


def test_cores_are_shared_out(no_gpu, monkeypatch):
    assert threads.use_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.use_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads.use_cores() == 1


def test_the_users_number_stays(no_gpu, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.use_cores() is None


def test_a_gpu_is_left_alone(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert threads.use_cores() is None
