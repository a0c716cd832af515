"""The aligned warm start: M8 on sampled states one by one, the term that teaches to stop, and each flag's effect."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import double_model, forward, unit
from peft import LoraConfig

from r2ec_trl.policy.rollouts import MarkerReader
from r2ec_trl.training.sampled_reasoning import best_of_groups

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
SAMPLED = {"reasoning": "sampled", "max_completion_length": 4, "num_generations": 2}


@pytest.fixture
def step(make_contrastive, monkeypatch):
    """`step(**settings)` is a trainer, its first batch, and what was rolled out for it."""

    def make(**settings):
        trainer = make_contrastive(**{**SAMPLED, **settings})
        trainer.create_optimizer()
        kept, inner = [], trainer.sampled.roll_out
        monkeypatch.setattr(
            trainer.sampled, "roll_out", lambda *args: kept.append((args[1], inner(*args))) or kept[-1][1]
        )
        torch.manual_seed(3)
        batch = trainer._collate([trainer.train_dataset[row] for row in range(8)])
        loss = trainer.compute_loss(trainer.model, batch)
        return trainer, batch, *kept[-1], loss

    return make


def test_loss_is_that_of_each_state_and_of_the_best_words(step, tiny_model, shop):
    """Three of eight users reason, twice each, the others not; float64, one by one."""
    trainer, batch, prompts, rollouts, loss = step(reasoning_share=0.3, stop_coef=0.25)
    assert prompts == [trainer.prompts.user_ids(shop["train"][row]) for row in range(8)]  # without the marker
    assert not any(rollout.has_marker for rollout in rollouts)
    assert len(rollouts) == 3 * 2 + 5 and [len(r.ids) for r in rollouts[6:]] == [len(trainer.prompts.marker_ids)] * 5
    model = double_model(tiny_model("llama"), LoraConfig(**LORA))
    model.load_state_dict(trainer.model.state_dict())
    targets = batch["targets"].tolist()
    candidates = sorted(set(targets))
    rows = torch.stack([unit(forward(model, trainer.table.token_ids[row])[1][-1]) for row in candidates])

    def of(user, rollout):
        logits, states = forward(model, prompts[user] + rollout.ids)
        item = torch.log_softmax(rows @ unit(states[-1]) / 0.1, dim=0)[candidates.index(targets[user])].item()
        start = len(prompts[user])
        words = torch.log_softmax(logits, dim=1)[range(start - 1, start + len(rollout.ids) - 1), rollout.ids]
        return item, words.sum().item(), len(rollout.ids)

    item, words, tokens = 0.0, 0.0, 0
    for user in range(3):
        scored = [of(user, rollout) for rollout in rollouts[2 * user : 2 * user + 2]]
        item += sum(each[0] for each in scored) / 2
        best = max(scored)
        words, tokens = words + best[1], tokens + best[2]
    item += sum(of(user, rollout)[0] for user, rollout in zip(range(3, 8), rollouts[6:], strict=True))
    assert loss.item() == pytest.approx(-item / 8 - 0.25 * words / tokens, abs=1e-3)


def test_flags_shape_what_is_sampled(step):
    """`reasoning_share`, `num_generations`, `max_completion_length`, `temperature`, `top_k`."""
    lengths = {}
    for share, size, most in ((0.5, 2, 4), (1.0, 3, 6)):
        rollouts = step(reasoning_share=share, num_generations=size, max_completion_length=most)[3]
        lengths[share] = [sum(rollout.trained) for rollout in rollouts]
    assert len(lengths[0.5]) == 4 * 2 + 4 and max(lengths[0.5]) == 4 and lengths[0.5][8:] == [0] * 4
    assert len(lengths[1.0]) == 8 * 3 and max(lengths[1.0]) == 6
    greedy = [step(**one)[3] for one in ({"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1.0})]
    assert all(a.ids == b.ids for a, b in zip(greedy[0][:8], greedy[1][:8], strict=True))
    assert all(greedy[0][i].ids == greedy[0][i + 1].ids for i in range(0, 8, 2))
    assert any(greedy[2][i].ids != greedy[2][i + 1].ids for i in range(0, 8, 2))


def test_groups_without_signal_teach_no_words(step):
    """`min_reward_spread` above every deviation leaves the item loss alone, and `stop_coef` changes nothing."""
    trainer, *_, loss = step(min_reward_spread=1.0, stop_coef=5.0)
    series = trainer.telemetry.series
    assert series["rollout/no_signal"] == [1.0] and loss.item() == pytest.approx(series["loss/item"][0])
    trainer, *_, loss = step(min_reward_spread=1e-9, stop_coef=5.0)
    assert trainer.telemetry.series["rollout/no_signal"][0] < 1
    assert loss.item() > trainer.telemetry.series["loss/item"][0]


def test_reasonings_that_end_by_themselves_are_left_alone(step, monkeypatch):
    """With every marker written by the policy the term is 0: trained on, they would get ever shorter."""
    finish = MarkerReader.finish
    monkeypatch.setattr(
        MarkerReader, "finish", lambda *args, **kwargs: replace(finish(*args, **kwargs), has_marker=True)
    )
    assert step(stop_coef=1.0)[0].telemetry.series["loss/stop"] == [0.0]


def test_taught_words_are_those_of_the_next_purchases(step, tiny_model):
    """The term's words are the titles' and the marker; the item loss is that of the same states as without it."""
    trainer, batch, prompts, _, loss = step(reasoning_share=0.3, stop_coef=0.25, taught_words=1)
    plain = step(reasoning_share=0.3)[0].telemetry.series["loss/item"][0]
    assert trainer.telemetry.series["loss/item"][0] == pytest.approx(plain, abs=1e-5)
    model = double_model(tiny_model("llama"), LoraConfig(**LORA))
    model.load_state_dict(trainer.model.state_dict())
    words, tokens = 0.0, 0
    for user, row in enumerate(batch["targets"].tolist()[:3]):
        title = trainer.prompts.titles[trainer.table.item_ids[row]]
        text = title.split()[0]
        ids = trainer.prompts.tokenizer(text, add_special_tokens=False)["input_ids"] + trainer.prompts.marker_ids
        logprobs = torch.log_softmax(forward(model, prompts[user] + ids)[0], dim=1)
        start = len(prompts[user]) - 1
        words, tokens = words + logprobs[range(start, start + len(ids)), ids].sum().item(), tokens + len(ids)
    assert loss.item() - plain == pytest.approx(-0.25 * words / tokens, abs=1e-3)


def test_it_learns_to_stop(make_contrastive):
    """Its best words and the marker after them become likelier."""
    trainer = make_contrastive(**SAMPLED, max_steps=15, learning_rate=1e-2, stop_coef=1.0, max_eval_users=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss/stop" in log]
    assert logs[-1]["loss/stop"] < 0.8 * logs[0]["loss/stop"]


def test_best_of_groups_of_one():
    assert best_of_groups(torch.tensor([[0.3], [0.2]]), 0.0).tolist() == [[True], [True]]
    assert math.isclose(torch.tensor([0.1, 0.3]).std(unbiased=False).item(), 0.1, abs_tol=1e-6)
    assert best_of_groups(torch.tensor([[0.1, 0.3]]), 0.11).tolist() == [[False, False]]
