"""Servers for the tests of every part of serving."""

import os

import pytest

from r2ec_trl.serving.recommender import Recommender


@pytest.fixture(scope="module")
def folder(make_bundle_folder, shop):
    """The demo's bundle, if R2EC_TRL_BUNDLE names it; else a tiny one."""
    items = shop["items"].add_column("price", [None if n == 5 else float(n) for n in range(40)])
    return os.environ.get("R2EC_TRL_BUNDLE") or make_bundle_folder(items=items)


@pytest.fixture(scope="module")
def served(folder):
    from served import Served

    server = Served(folder, max_queue=64)
    yield server
    server.close()


@pytest.fixture(scope="module")
def library(folder):
    return Recommender.from_pretrained(folder)


@pytest.fixture
def changing(own):
    """A server whose catalogue the test may change."""
    from served import Served

    server = Served(own, body_seconds=0.5, max_body=4096)
    yield server
    server.close()
