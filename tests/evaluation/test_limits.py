"""What a protocol says is what is done: so many tokens, no reasoning where it says none, the rows asked for."""

from dataclasses import replace

import pytest
import torch

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.policy import generation
from r2ec_trl.serving.recommender import Recommender


@pytest.fixture
def lengths(monkeypatch):
    """The longest reasoning that each call of `generate` was allowed."""
    asked, plain = [], generation.GenerationConfig
    monkeypatch.setattr(
        generation,
        "GenerationConfig",
        lambda **settings: asked.append(settings["max_new_tokens"]) or plain(**settings),
    )
    return asked


def test_a_bundle_reasons_as_long_as_its_protocol_says(written, shop, lengths):
    bundle = Bundle.load(written)
    frame = bundle.evaluate(shop["test"])
    assert lengths == [8] and frame["reasoning_tokens"].max() == 8
    Recommender(bundle).recommend([["i00"], ["i01"]], 3)
    assert lengths == [8, 8]


def test_a_trainer_evaluates_as_long_as_it_trains(make_trainer, shop, lengths):
    trainer = make_trainer(max_completion_length=5)
    frame = trainer.evaluate_frame(shop["test"])
    assert set(lengths) == {5} and frame["reasoning_tokens"].max() == 5


def test_a_bundle_without_reasoning_writes_none(written, shop, lengths):
    bundle = Bundle.load(written)
    bundle.meta = replace(bundle.meta, protocol=replace(bundle.meta.protocol, reasoning="none"))
    frame = bundle.evaluate(shop["test"])
    [answer] = Recommender(bundle).recommend([["i00"]], 3)
    assert lengths == [] and set(frame["reasoning_tokens"]) == {0} and not frame["has_marker"].any()
    assert answer.reasoning == "" and not answer.has_marker
    assert not frame.equals(Bundle.load(written).evaluate(shop["test"])) and lengths == [8]


def test_an_item_removed_from_the_middle_takes_no_other_row_with_it(own):
    bundle = Bundle.load(own)
    bundle.remove_items(["i07", "i20"])
    for reader in (bundle, Bundle.load(own)):
        fresh = reader._encode([reader.table.token_ids[row] for row in range(len(reader.table))])
        assert len(fresh) == 38 and torch.allclose(fresh, reader.table.rows, atol=1e-5)
        assert reader.table.item_ids == [f"i{n:02d}" for n in range(40) if n not in (7, 20)]


def test_figures_of_one_user_are_those_of_its_rank(make_trainer, shop):
    trainer = make_trainer(max_completion_length=4)
    for row in range(3):
        users = shop["test"].select([row])
        [rank] = trainer.evaluate_frame(users)["rank"]
        found = trainer.evaluate(users, metric_key_prefix="test")
        assert found["test_recommendation/hit@20"] == (rank <= 20) and found["test_recommendation/hit@5"] == (
            rank <= 5
        )
