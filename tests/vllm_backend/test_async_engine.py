"""vLLM's async engine writes what the policy itself writes; reasonings join and leave while others are written."""

import os
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason='needs `pip install "r2ec_trl[serve]"`')

from served import Served, same  # noqa: E402

from r2ec_trl.cli.bundle_choice import BundleArguments, writer_of  # noqa: E402
from r2ec_trl.serving.batching import Batcher  # noqa: E402
from r2ec_trl.serving.recommender import Recommender  # noqa: E402

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def writer(served_folder):
    kept = dict(os.environ)
    if not torch.cuda.is_available():
        os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_CI_ENV="1", VLLM_LOGGING_LEVEL="ERROR")
    bundle = Recommender.from_pretrained(served_folder).bundle
    made = writer_of(BundleArguments(bundle=str(served_folder), engine="vllm"), bundle)
    os.environ.clear()
    os.environ.update(kept)
    yield made
    made.close()


class Kept:
    """The module's writer, which a server's end does not end."""

    def __init__(self, writer):
        self.write, self.alive, self.close = writer.write, True, lambda: None


def test_a_server_answers_as_the_library_does(served_folder, library, writer):
    """Adapter included; a stream brings the reasoning in pieces."""
    ids = library.bundle.table.item_ids
    server = Served(served_folder, writer=Kept(writer))
    histories = [ids[n : n + 1 + n % 4] for n in range(16)]
    for answer, expected in zip(server.ask(*histories).json()["users"], library.recommend(histories), strict=True):
        same(answer, expected)
        assert answer["timings"]["written"] > 0
    [quick] = server.ask(ids[:1], reasoning="none").json()["users"]
    same(quick, library.recommend([ids[:1]], reasoning="none")[0])
    with server.client.stream("POST", "/v1/recommend/stream", json={"users": [{"history": ids[:2]}]}) as got:
        kinds = [line[7:] for line in got.iter_lines() if line.startswith("event: ")]
    assert kinds[-1] == "items" and kinds.count("reasoning") > 1
    server.close()


def test_one_joins_while_another_is_written_and_one_leaves(library, writer):
    prompt, other = (
        library.bundle.prompts.user_ids({"history": [item]}) for item in library.bundle.table.item_ids[:2]
    )
    begun, gate, lengths = threading.Event(), [], []

    def slow(ids):
        begun.set()
        lengths.append(len(ids))
        return len(ids) >= 2  # nobody wants more

    left = writer.write(prompt, slow)
    joined = writer.write(other, lambda ids: gate.append(time.monotonic()) or False)
    assert begun.wait(60)
    [whole] = library.bundle.reasoner(None)([other], library.bundle.meta.protocol.max_completion_length)
    assert joined.result(60) == whole
    assert len(left.result(60).ids) <= lengths[-1] + 8 and max(lengths) < len(whole.ids) and writer.alive
    assert writer._engine.output_processor.get_num_unfinished_requests() == 0  # its slot is free


def test_a_batcher_over_it_ends_cleanly(library, writer):
    batcher = Batcher(Recommender(library.bundle), writer=Kept(writer))
    jobs = batcher.submit([{"history": library.bundle.table.item_ids[:n]} for n in (1, 2, 3)], 60)
    batcher.close()
    assert [job.future.result(1).reasoning for job in jobs] == [
        one.reasoning for one in library.recommend([library.bundle.table.item_ids[:n] for n in (1, 2, 3)])
    ]
