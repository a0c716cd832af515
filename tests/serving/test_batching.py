"""The queue in front of the model: bounds, deadlines, and a question that fails alone."""

import concurrent.futures
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason='needs `pip install "r2ec_trl[serve]"`')
from served import Served, batcher_of  # noqa: E402

from r2ec_trl.errors import UserError  # noqa: E402
from r2ec_trl.serving.batching import Batcher, Refused  # noqa: E402
from r2ec_trl.serving.recommender import Recommender  # noqa: E402


def test_one_that_breaks_the_model_is_alone_with_it(library, monkeypatch, caplog):
    ids = library.bundle.table.item_ids
    answer = Recommender.answer

    def breaks(self, questions, watch=None):
        if any(question.user.get("user_id") == "poison" for question in questions):
            raise RuntimeError("CUDA error")
        return answer(self, questions, watch)

    monkeypatch.setattr(Recommender, "answer", breaks)
    batcher = Batcher(library, window=0.2)
    jobs = batcher.submit([{"history": {"history": ids[n : n + 2], "user_id": f"u{n}"}} for n in range(5)], 30)
    jobs += batcher.submit([{"history": {"history": ids[:1], "user_id": "poison"}}], 30)
    assert [job.future.result(30).user_id for job in jobs[:5]] == [f"u{n}" for n in range(5)]
    with pytest.raises(RuntimeError, match="CUDA error"):
        jobs[5].future.result(30)
    batcher.close()
    with pytest.raises(Refused, match="shutting down"):
        batcher.submit([{"history": ids[:1]}], 30)


def test_the_queue_is_bounded_and_says_when_to_come_back(served, library):
    ids, held = library.bundle.table.item_ids, threading.Event()
    app_batcher = batcher_of(served)
    blocking = app_batcher.call(held.wait)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(served.ask, *[ids[:1]] * 64)
        while app_batcher.waiting < 64:
            time.sleep(0.01)
        refused = served.ask(ids[:1])
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert "64 users are waiting" in refused.json()["error"]
        assert served.client.get("/readyz").status_code == 503
        assert served.client.get("/healthz").status_code == 200
        held.set()
        assert blocking.result(10) is True
        assert waiting.result().status_code == 200
    assert served.client.get("/readyz").status_code == 200 and served.ask(ids[:1]).status_code == 200


def test_who_left_holds_no_place_in_the_queue(library):
    """Nor does who waits no longer; more users than ever wait are told the bound."""
    held, batcher = threading.Event(), Batcher(library, max_queue=2)
    ask = {"history": library.bundle.table.item_ids[:1], "reasoning": "none"}
    batcher.call(held.wait)
    gone = batcher.submit([ask] * 2, 30)
    with pytest.raises(Refused, match="2 users are waiting"):
        batcher.submit([ask], 30)
    for job in gone:
        job.future.cancel()
    assert batcher.waiting == 0
    batcher.submit([ask] * 2, 0.01)
    time.sleep(0.05)
    jobs = batcher.submit([ask] * 2, 30)
    with pytest.raises(UserError, match="3 users are more than may wait .--max_queue 2"):
        batcher.submit([ask] * 3, 30)
    held.set()
    assert [len(job.future.result(30).items) for job in jobs] == [10, 10]
    batcher.close()


def test_an_empty_reasoning_is_not_written(own):
    library = Recommender.from_pretrained(own)
    batcher = Batcher(library, writer=SimpleNamespace(alive=True, close=lambda: None))  # it cannot write
    [job] = batcher.submit([{"history": ["i00"], "reasoning": ""}], 30)
    assert job.future.result(30) == Recommender.from_pretrained(own).recommend([["i00"]], reasoning="")[0]
    batcher.close()


def test_a_deadline_is_kept_while_the_model_is_busy(own):
    server = Served(own, deadline=0.3)
    held = threading.Event()
    batcher_of(server).call(held.wait)
    start = time.monotonic()
    late = server.ask(["i00"])
    streamed = server.client.post("/v1/recommend/stream", json={"users": [{"history": ["i00"]}]})
    assert late.status_code == streamed.status_code == 504 and time.monotonic() - start < 3
    assert "time for this request is over" in late.json()["error"] == streamed.json()["error"]
    held.set()
    assert server.ask(["i00"]).status_code == 200
    server.close()


def test_closing_answers_what_is_waiting(own):
    server = Served(own, window=0.5)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.ask, [f"i0{n}"]) for n in range(4)]
        time.sleep(0.2)
        server.close()
        assert [answer.result().status_code for answer in waiting] == [200] * 4


class SlowWriter:
    """Writes as the model does, one token a turn for every prompt that is there, on a thread of its own."""

    alive = True

    def __init__(self, bundle):
        self.bundle, self.pool, self.turns = bundle, concurrent.futures.ThreadPoolExecutor(8), {}
        self.gate = threading.Event()

    def write(self, prompt_ids, heard):
        def run():
            [rollout] = self.bundle.reasoner(None)([prompt_ids], self.bundle.meta.protocol.max_completion_length)
            ids = []
            for token in rollout.ids:
                ids.append(token)
                if len(ids) == 3:
                    self.gate.wait(20)
                self.turns[tuple(prompt_ids)] = len(ids)
                if heard(ids):
                    break
            return rollout

        return self.pool.submit(run)

    def close(self):
        self.pool.shutdown()


def test_a_writer_begins_one_while_others_are_written(own):
    """Reasonings of a writer join and leave on their own, are heard as they come, and are counted by the bound."""
    library = Recommender.from_pretrained(own)
    writer, pieces = SlowWriter(Recommender.from_pretrained(own).bundle), []
    batcher = Batcher(library, writer=writer, max_queue=3)
    [first] = batcher.submit([{"history": ["i00", "i01"]}], 30, [pieces.append])
    while 2 not in writer.turns.values():
        time.sleep(0.01)
    [gone] = batcher.submit([{"history": ["i05"]}], 30)
    while len(writer.turns) < 2:
        time.sleep(0.01)
    assert batcher.waiting == 2 and not first.future.done() and writer.alive and batcher.alive
    [quick] = batcher.submit([{"history": ["i02"], "reasoning": "none"}], 30)
    assert quick.future.result(30) == Recommender.from_pretrained(own).recommend([["i02"]], reasoning="none")[0]
    with pytest.raises(Refused, match="2 users are waiting"):
        batcher.submit([{"history": ["i00"]}] * 2, 30)
    gone.future.cancel()
    writer.gate.set()
    [expected] = Recommender.from_pretrained(own).recommend([["i00", "i01"]])
    assert first.future.result(30).reasoning == expected.reasoning and first.timings["written"] > 0
    assert [item.item_id for item in first.future.result().items] == [item.item_id for item in expected.items]
    assert "".join(pieces).strip() == expected.reasoning
    writer.write = lambda *_: 1 / 0
    [broken] = batcher.submit([{"history": ["i00"]}], 30)
    with pytest.raises(ZeroDivisionError):
        broken.future.result(30)
    batcher.close()
    assert batcher.waiting == 0 and sorted(writer.turns.values())[0] == 3  # who left was written no further


def test_the_window_counts_from_arrival(library):
    """Who has waited behind a busy model for longer than the window is answered at once."""
    held, batcher = threading.Event(), Batcher(library, window=20)
    batcher.call(held.wait)
    [job] = batcher.submit([{"history": library.bundle.table.item_ids[:1], "reasoning": "none"}], 60)
    job.arrived -= 20
    held.set()
    assert len(job.future.result(10).items) == 10
    batcher.close()


def test_an_engine_that_ended_is_no_full_queue(own):
    writer = SlowWriter(Recommender.from_pretrained(own).bundle)
    server = Served(own, writer=writer)
    assert server.client.get("/readyz").status_code == 200
    writer.alive = False
    for path in ("/readyz", "/healthz"):
        answer = server.client.get(path)
        assert answer.status_code == 503 and answer.json() == {"error": "The model's thread has ended."}
    server.close()


def test_changes_that_would_be_lost_are_refused(launch, own, monkeypatch):
    """A bundle of the hub is changed in memory alone, and the server says of a change that it is on disk."""
    monkeypatch.setattr("r2ec_trl.bundle.format.snapshot_download", lambda name: str(own))
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    monkeypatch.setenv("R2EC_TRL_TOKEN", "sesam")
    with pytest.raises(UserError, match="changes of the hub's someone/games would be lost"):
        launch("serve", "--bundle", "someone/games", "--page", "false")
