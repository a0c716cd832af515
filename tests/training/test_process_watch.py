"""Who is behind the others. What it does to real processes: test_faults.py."""

import os
import queue
from types import SimpleNamespace

import torch.distributed as dist

from r2ec_trl.training.process_watch import ProcessWatch


def test_one_process_is_not_watched():
    with ProcessWatch(0, 1, timeout=1.0) as watch:
        watch.beat("somewhere")
        assert watch.missing() == ""


def test_the_process_that_does_not_go_on_is_named(monkeypatch):
    """Two watches of one process, on a store of their own; the first goes on twice, the second once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(store.port))
    with ProcessWatch(0, 2, timeout=60.0, poll=0.02) as first:
        monkeypatch.setattr(ProcessWatch, "_number", ProcessWatch._number - 1)  # the same watch on another process
        with ProcessWatch(1, 2, timeout=60.0, poll=0.02) as second:
            first.beat("'generate' of step 3")
            first.beat("'score' of step 3")
            second.beat("'generate' of step 3")
            store.wait([f"{first._prefix}place/1"])
            while first.missing() != "process 1 is still at 'generate' of step 3":
                assert "process 0" not in first.missing()


def test_a_process_that_goes_on_is_never_taken_for_a_hanging_one(monkeypatch):
    """
    Up for 100 s, never 60 s without progress, though the other process is behind; then 61 s without. The sentence
    tells the seconds since the last progress.
    """
    store, clock, ended = dist.TCPStore("127.0.0.1", 0, is_master=True), [0.0], queue.Queue()
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(store.port))
    monkeypatch.setattr("r2ec_trl.training.process_watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(ProcessWatch, "_end", lambda self, sentence: ended.put(sentence))
    with ProcessWatch(0, 2, timeout=60.0, poll=0.01) as watch:
        for clock[0] in (50.0, 100.0):
            watch.beat(f"'train' of step {clock[0]:.0f}")
        clock[0] = 161.0
        sentence = ended.get(timeout=60)
    assert sentence.startswith(
        "No progress for 61 s: process 1 is still at the start, while process 0 waits at 'train' of step 100"
    )


def test_leaving_on_purpose_is_no_fault(monkeypatch):
    """After SIGTERM each process saves and leaves by SystemExit: nobody is told of a fault, nobody is ended."""
    store, timers = dist.TCPStore("127.0.0.1", 0, is_master=True), []
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(store.port))
    timer = SimpleNamespace(start=lambda: timers.append(1))
    monkeypatch.setattr("r2ec_trl.training.process_watch.threading.Timer", lambda *_: timer)
    for error, faults in ((SystemExit(143), 0), (None, 0), (ValueError("shapes"), 1)):
        watch = ProcessWatch(0, 2, timeout=60.0, poll=60.0).__enter__()
        watch.__exit__(type(error), error, None)
        assert len(timers) == faults == int(store.check([f"{watch._prefix}fault"]))
