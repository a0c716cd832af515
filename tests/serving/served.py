"""A server in a thread of the test's process; imported by tests that were not skipped."""

import threading
import time

import httpx
import pytest
import torch
import uvicorn

from r2ec_trl.serving.batching import Batcher
from r2ec_trl.serving.messages import Limits
from r2ec_trl.serving.recommender import Recommender
from r2ec_trl.serving.server import make_app

TOKEN = "sesam öffne dich"
KEY = {"Authorization": f"Bearer {TOKEN}".encode()}


class Served:
    """A server in a thread of this process, on a free port."""

    def __init__(self, folder, token=TOKEN, mount=None, writer=None, **limits):
        torch.set_num_threads(1)
        self.recommender = Recommender.from_pretrained(folder)
        app = make_app(self.recommender, Limits(**limits), token, mount, writer)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def ask(self, *histories, client=None, **options):
        users = [one if isinstance(one, dict) else {"history": one} for one in histories]
        return (client or self.client).post("/v1/recommend", json={"users": users, **options})

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.client.close()


def batcher_of(served):
    """The application's batcher, from the route that asks for its queue."""
    for route in served.server.config.app.app.routes:
        for cell in getattr(getattr(route, "endpoint", None), "__closure__", None) or ():
            if isinstance(cell.cell_contents, Batcher):
                return cell.cell_contents
    raise AssertionError("no batcher")


def same(answer, expected):
    """The server's JSON is the library's answer."""
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx(
        [item.score for item in expected.items], abs=1e-5
    )
    for name in ("reasoning", "has_marker", "user_id", "reasoning_tokens"):
        assert answer[name] == getattr(expected, name)
