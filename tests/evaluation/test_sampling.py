"""Sampled reasonings with their ranks: G a user in order, each likelihood and rank that of a plain loop."""

import polars as pl
import pytest
import torch
from oracle import double_model, forward, unit

from r2ec_trl.evaluation.sampling import log_likelihoods, most_likely, sample_reasonings, sample_users
from r2ec_trl.evaluation.users import evaluate_users
from r2ec_trl.policy.rollouts import MarkerReader


def test_each_sample_has_the_rank_and_likelihood_of_a_plain_loop(recommender, shop, tiny_model):
    model, prompts, table = recommender
    users = shop["test"].select([3, 0, 5])
    frame, rollouts = sample_users(model, prompts, table, users, 4, max_new_tokens=5, item_temperature=0.05)
    assert frame["row"].to_list() == [0] * 4 + [1] * 4 + [2] * 4
    assert frame["user_id"].to_list() == [name for name in users["user_id"][:] for _ in range(4)]
    assert len({tuple(ids) for ids in frame["completion_ids"].to_list()}) > 6  # drawn, not greedy
    plain = double_model(tiny_model("llama"))
    with torch.no_grad():
        rows = torch.stack([unit(forward(plain, ids)[1][-1]) for ids in table.token_ids])
        for row, rollout in zip(frame.to_dicts(), rollouts, strict=True):
            user = users[row["row"]]
            ids, written = prompts.user_ids(user), sum(rollout.trained)
            logits, states = forward(plain, ids + rollout.ids)
            scores, target = rows @ unit(states[-1]), table.index[user["target"]]
            assert row["rank"] == 1 + int((scores > scores[target]).sum())
            kept = [i for i in range(len(rows)) if i not in table.row_indices(user["history"])]
            assert row["rank_masked"] == 1 + int((scores[kept] > scores[target]).sum())
            assert row["target_prob"] == pytest.approx(torch.softmax(scores / 0.05, 0)[target].item(), abs=1e-4)
            likelihood = sum(logits[len(ids) - 1 + i].log_softmax(-1)[rollout.ids[i]].item() for i in range(written))
            assert row["log_likelihood"] == pytest.approx(likelihood, abs=1e-3)
            assert row["completion"] == prompts.tokenizer.decode(rollout.ids[:written], skip_special_tokens=True)


def test_the_seed_decides_and_the_callers_random_state_stays(recommender, shop):
    model, prompts, _ = recommender
    ids = [prompts.user_ids(shop["test"][0])]
    reader = MarkerReader(prompts.tokenizer, prompts.config.marker)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (sample_reasonings(model, reader, ids, 6, 8, 4096, seed=seed) for seed in (1, 1, 2))
    assert one == same != other and torch.equal(state, torch.get_rng_state())


def test_a_cold_temperature_is_greedy(recommender, shop):
    model, prompts, table = recommender
    users = shop["test"].select([3, 0])
    frame, _ = sample_users(model, prompts, table, users, 2, 5, 0.05, temperature=1e-4)
    greedy = evaluate_users(model, prompts, table, users, max_new_tokens=5, temperature=0.05)
    assert frame["reasoning"].to_list() == [text for text in greedy["reasoning"] for _ in range(2)]


def test_the_likeliest_of_each_user_and_the_first_among_equals():
    frame = pl.DataFrame({"row": [0, 0, 0, 1, 1], "log_likelihood": [-3.0, -1.0, -2.0, -5.0, -5.0]})
    assert most_likely(frame) == [1, 3]


class AllLogits(torch.nn.Module):
    """A model that returns the logits of every position, whatever is asked."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("budget", [8, 300, 100_000])
@pytest.mark.parametrize("wrapper", [lambda model: model, AllLogits], ids=["last logits", "all logits"])
def test_a_likelihood_is_that_of_a_plain_forward(recommender, shop, budget, wrapper):
    model, prompts, _ = recommender
    ids = [prompts.user_ids(user) for user in shop["test"]]
    reader = MarkerReader(prompts.tokenizer, prompts.config.marker)
    rollouts = sample_reasonings(model, reader, ids, 1, 6, 4096)
    assert len({len(prompt) for prompt in ids}) > 1
    plain = []
    for prompt, rollout in zip(ids, rollouts, strict=True):
        written = rollout.ids[: sum(rollout.trained)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0].float().log_softmax(-1)
        plain.append(sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(written)))
    found = log_likelihoods(wrapper(model), ids, rollouts, prompts.tokenizer.pad_token_id, budget)
    assert found == pytest.approx(plain, abs=1e-4)
