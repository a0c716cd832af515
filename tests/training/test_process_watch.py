"""Who is behind the others. What it does to real processes: test_faults.py."""

import os

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
