"""The reward pass: what rewards see is scored against fresh rows of the batch's targets, whatever the budget."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.rollouts import Rollout
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.reward_pass import RewardPass, as_sampled


@pytest.fixture
def rollouts(replay, chat_tokenizer):
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]
    return replay(lambda prompt_ids, number: [40 + len(prompt_ids) % 50 + number, 60, *marker])


@pytest.mark.parametrize("watch_steps", [0, 1])
def test_ranks_and_scores_are_those_of_freshly_encoded_targets(make_trainer, rollouts, watch_steps):
    """
    No budget, and a step between: the rest of the table is that of the start, the targets are encoded anew, and what
    the rewards see are the scores against just these rows, also where the old ones are measured beside.
    """
    seen = []

    def reward(completions, **kwargs):
        with torch.no_grad():
            encoder = make_encoder(trainer.model, trainer.prompts, 9_999)
            fresh = trainer.table.project(encoder(trainer.table.token_ids))
        rows = start.clone() if seen else fresh  # the first pass encodes everything
        targets = trainer.table.row_indices(kwargs["target"])
        rows[targets] = fresh[targets]
        seen.append((kwargs, rows))
        return [0.1 * i for i in range(len(completions))]

    trainer = make_trainer(
        reward=reward, table_refresh_budget=0.0, learning_rate=3e-2, max_steps=2, watch_steps=watch_steps
    )
    trainer.train_dataset = trainer.train_dataset.select(range(2))  # the same two targets twice
    inner = trainer.reward_pass.refresh
    start = torch.empty(0)

    def keep(*args):
        nonlocal start
        whole = inner(*args)
        start = trainer.table.rows.clone() if whole else start
        return whole

    trainer.reward_pass.refresh = keep
    trainer.train()
    kwargs, rows = seen[1]
    states = trainer.batch.states
    scores = states @ rows.T
    for i, target in enumerate(trainer.table.row_indices(kwargs["target"])):
        assert kwargs["target_score"][i] == pytest.approx(scores[i, target].item(), abs=1e-5)
        assert kwargs["target_rank"][i] == 1 + int((scores[i] > scores[i, target] + 1e-7).sum())
    assert not torch.allclose(rows[trainer.batch.candidates], start[trainer.batch.candidates], atol=1e-3)
    assert torch.allclose(trainer.batch.target_rows, rows[trainer.batch.candidates], atol=1e-5)
    if watch_steps:  # what the targets gained by being fresh, each among the rows of the start
        old = states @ start.T
        targets = trainer.table.row_indices(kwargs["target"])
        stale = [1 + int((old[i] > old[i, target] + 1e-7).sum()) for i, target in enumerate(targets)]
        gains = [math.log(a / b) for a, b in zip(stale, kwargs["target_rank"], strict=True)]
        found = trainer.state.log_history[1]["table/fresh_rank_gain"]
        assert found == pytest.approx(sum(gains) / len(gains), abs=1e-5) and abs(found) > 0.01


def test_a_reward_sees_no_more_items_than_are_left(make_trainer, rollouts, shop):
    """Of 40 items 35 are masked: the lists are of the other five alone."""
    history = shop["items"]["item_id"][:35]
    users = [{"user_id": f"u{target}", "history": history, "target": target} for target in ("i36", "i37")]
    seen = []

    def reward(completions, top_item_ids, **kwargs):
        seen.extend(top_item_ids)
        return [0.1 * i for i in range(len(completions))]

    make_trainer(reward=reward, train=Dataset.from_list(users), mask_history=True, max_steps=1).train()
    assert len(seen) == 8 and all(sorted(items) == shop["items"]["item_id"][35:] for items in seen)


def test_rewards_read_what_the_policy_wrote(chat_tokenizer):
    """An appended marker is no word of the policy's; one it wrote stays."""
    ids = chat_tokenizer("drum", add_special_tokens=False)["input_ids"]
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]
    message = [{"role": "assistant", "content": "drum<answer>"}]
    trained = [1] * len(ids) + [0] * len(marker)
    without = Rollout(ids + marker, trained, False, False, False)
    assert as_sampled(message, without, chat_tokenizer) == [{"role": "assistant", "content": "drum"}]
    written = Rollout(ids + marker, [1] * len(trained), True, False, False)
    assert as_sampled(message, written, chat_tokenizer) == message


def test_never_is_a_number_for_watching_and_none_for_refreshing(tmp_path):
    """`watch_steps` 0 measures nothing; a table that is refreshed every 0 steps means nothing."""
    assert RecPOConfig(str(tmp_path), use_cpu=True, watch_steps=0).watch_steps == 0
    for steps in (0, -1):
        with pytest.raises(UserError, match=f"`table_refresh_steps` is {steps}; it must be at least 1"):
            RecPOConfig(str(tmp_path), use_cpu=True, table_refresh_steps=steps)


def reward_pass(step=0, **settings):
    """A pass over three items of 3, 2 and 2 tokens, and what it asked its encoder for."""
    table = ItemTable(["a", "b", "c"], [[1, 1, 1], [2, 2], [3, 3]], "dot")
    table.refresh(lambda sequences: torch.zeros(len(sequences), 2))
    asked = []

    def encoder(sequences):
        asked.append([ids[0] for ids in sequences])
        return torch.ones(len(sequences), 2)

    defaults = {"table_refresh_budget": 0.25, "table_refresh_steps": None}
    telemetry = SimpleNamespace(step=lambda: step)
    made = RewardPass(table, None, SimpleNamespace(**{**defaults, **settings}), None, telemetry)
    return partial(made.refresh, encoder), asked


def test_the_whole_table_is_refreshed_where_it_costs_no_more_than_its_share():
    """A fourth of 28 tokens is all 7; of 27 it is 6: the round's first two, of which a target is left out."""
    refresh, asked = reward_pass()
    assert refresh([0], 27) is False and asked == [[2]]
    assert refresh([0], 28) is True and asked[1:] == [[1, 2, 3]]


@pytest.mark.parametrize("step, due", [(0, True), (6, False), (12, True), (18, True), (30, False)])
def test_a_refresh_is_due_when_its_step_has_passed_since_the_batch_before(step, due):
    """Rollouts of four micro-batches, each trained on three times, two to a step: new ones every six steps."""
    settings = {"steps_per_generation": 4, "num_iterations": 3, "gradient_accumulation_steps": 2}
    refresh, _ = reward_pass(step, table_refresh_steps=8, **settings)
    assert refresh([], 0) is due


def test_the_budget_is_of_all_processes_rollouts(make_trainer, rollouts, monkeypatch):
    budgets = []
    for processes in (1, 2):
        monkeypatch.setattr("r2ec_trl.training.reward_pass.gather_object", lambda values: values * processes)
        trainer = make_trainer(reward=lambda completions, **kwargs: [0.5] * len(completions), max_steps=1)
        inner = trainer.reward_pass.refresh
        trainer.reward_pass.refresh = lambda *args: budgets.append(args[-1]) or inner(*args)
        trainer.train()
    assert budgets[1] == 2 * budgets[0] > 0
