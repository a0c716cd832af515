"""Greedy evaluation: one row a user in order, both masks, altered reasoning; HF's flags choose and stop by it."""

from types import SimpleNamespace

import polars as pl
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import double_model, forward, unit
from transformers import EarlyStoppingCallback

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import alter_reasoning, evaluate_users, gather_rows, own_rows, summarise_users
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.metrics import ndcg_at_k
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Rollout

SHORT = PromptConfig(user_template="{history}", item_template="{fields}", item_fields=("title",))


def rollout(*ids) -> Rollout:
    return Rollout(list(ids), [1] * len(ids), True, False, False)


# ----------------------------------------------------------------------------------- evaluate_users
def test_one_row_a_user_in_order_with_the_ranks_of_a_plain_loop(recommender, shop, tiny_model):
    model, prompts, table = recommender
    dataset = shop["test"].select([7, 2, 9, 0, 4])
    frame = evaluate_users(model, prompts, table, dataset, max_new_tokens=5, temperature=0.05)
    assert frame["user_id"].to_list() == dataset["user_id"][:] and frame["target"].to_list() == dataset["target"][:]
    assert frame.columns == [
        "user_id",
        "target",
        "rank",
        "rank_masked",
        "logprob",
        "reasoning",
        "reasoning_tokens",
        "has_marker",
        "top_item_ids",
    ]
    assert sorted(frame["reasoning_tokens"].to_list()) == [0, 5, 5, 5, 5]
    plain = double_model(tiny_model("llama"))
    with torch.no_grad():
        rows = torch.stack([unit(forward(plain, ids)[1][-1]) for ids in table.token_ids])
        for example, row in zip(dataset, frame.to_dicts(), strict=True):
            ids, reasoning = prompts.user_ids(example), []
            while len(reasoning) < 5:  # greedy by hand; this model writes no marker, but one user's reasoning ends
                token = forward(plain, ids + reasoning)[0][-1].argmax().item()
                if token == prompts.tokenizer.eos_token_id:
                    break
                reasoning.append(token)
            scores = rows @ unit(forward(plain, ids + reasoning + prompts.marker_ids)[1][-1])
            target, history = table.index[example["target"]], table.row_indices(example["history"])
            assert row["rank"] == 1 + int((scores > scores[target]).sum())
            open_rows = [i for i in range(len(scores)) if i not in history]
            assert row["rank_masked"] == 1 + int((scores[open_rows] > scores[target]).sum())
            assert row["logprob"] == pytest.approx(torch.log_softmax(scores / 0.05, 0)[target].item(), abs=1e-3)
            best = scores.argsort(descending=True)[:10].tolist()
            assert row["top_item_ids"] == [table.item_ids[i] for i in best]
            assert row["reasoning_tokens"] == len(reasoning) and not row["has_marker"]
            assert row["reasoning"].endswith("<answer>")


def test_a_masked_repeat_is_a_miss_and_an_unmasked_one_can_hit(recommender, shop):
    model, prompts, table = recommender
    example = shop["test"][0]
    repeat = shop["test"].from_list([{**example, "target": example["history"][-1]}, example])
    frame = evaluate_users(model, prompts, table, repeat, max_new_tokens=2, temperature=0.05)
    assert frame["rank_masked"][0] == len(table) + 1 and frame["rank"][0] <= len(table)
    assert frame["rank_masked"][1] <= frame["rank"][1]  # the mask only takes rivals away
    assert all(summarise_users(frame)[f"masked_hit@{k}"] <= 0.5 for k in (5, 10, 20))


def test_given_rollouts_are_used_and_none_means_no_reasoning(recommender, shop):
    model, prompts, table = recommender
    dataset, marker = shop["test"].select([0, 1, 2]), prompts.marker_ids
    rollouts = [rollout(50 + i, *marker) for i in range(3)]
    given = evaluate_users(model, prompts, table, dataset, 5, 0.05, rollouts=rollouts)
    assert given["reasoning_tokens"].to_list() == [1 + len(marker)] * 3 and given["has_marker"].all()
    none = evaluate_users(model, prompts, table, dataset, 5, 0.05, reasoning="none")
    assert none["reasoning"].to_list() == ["<answer>"] * 3 and none["reasoning_tokens"].to_list() == [0] * 3
    assert none.equals(evaluate_users(model, prompts, table, dataset, 5, 0.05, reasoning="none", rollouts=rollouts))
    assert none["logprob"].to_list() != given["logprob"].to_list()


def test_a_catalogue_smaller_than_every_cutoff(tiny_model, chat_tokenizer, shop):
    items = shop["items"].select(range(3))
    users = shop["test"].from_list([{"user_id": "u", "history": ["i00"], "target": "i02"}])
    model = tiny_model("llama")
    add_answer_state(model)
    prompts = Prompts(chat_tokenizer, SHORT, items)
    table = make_table(prompts, items, "cosine", "cpu")
    table.refresh(make_encoder(model, prompts, 100))
    frame = evaluate_users(model, prompts, table, users, max_new_tokens=1, temperature=1.0)
    assert 1 <= frame["rank"][0] <= 3 and 1 <= frame["rank_masked"][0] <= 2
    assert len(frame["top_item_ids"][0]) == 3 and summarise_users(frame)["hit@5"] == 1


# ----------------------------------------------------------------------------------- alter_reasoning
@settings(max_examples=40)
@given(count=st.integers(2, 20), seed=st.integers(0, 99))
def test_other_gives_everyone_somebody_elses_reasoning(chat_tokenizer, count, seed):
    reader = MarkerReader(chat_tokenizer, "<answer>")
    own = [rollout(user) for user in range(count)]
    other = alter_reasoning(own, reader, "other", seed)
    assert sorted(r.ids for r in other) == [r.ids for r in own]
    assert all(a.ids != b.ids for a, b in zip(own, other, strict=True))
    assert other == alter_reasoning(own, reader, "other", seed)


def test_truncated_none_and_full(chat_tokenizer):
    reader = MarkerReader(chat_tokenizer, "<answer>")
    marker = reader.marker_ids
    own = [rollout(51, 52, 53, 54, 55, *marker), rollout(*marker)]
    assert alter_reasoning(own, reader, "full") == own
    halves = alter_reasoning(own, reader, "truncated")
    assert [r.ids for r in halves] == [[51, 52, *marker], marker]
    assert [r.ids for r in alter_reasoning(own, reader, "none")] == [marker, marker]
    with pytest.raises(UserError, match="full, none, truncated, other"):
        alter_reasoning(own, reader, "backwards")


def test_summary_by_hand():
    frame = pl.DataFrame(
        {
            "user_id": list("uvwx"),
            "rank": [1, 3, 30, 11],
            "rank_masked": [1, 41, 30, 9],
            "has_marker": [True, True, False, True],
            "reasoning_tokens": [2, 4, 6, 0],
            "top_item_ids": [["a", "b"], ["a"], ["c"], ["a"]],
        }
    )
    figures = summarise_users(frame)
    assert figures["hit@5"] == 0.5 and figures["hit@20"] == 0.75 and figures["masked_hit@10"] == 0.5
    assert figures["ndcg@10"] == pytest.approx((1 + 0.5) / 4)
    assert figures["mrr@20"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)
    assert figures["ndcg@10_low"] < figures["ndcg@10"] < figures["ndcg@10_high"] <= figures["masked_ndcg@10_high"]
    assert figures["missing_marker"] == 0.25 and figures["reasoning_tokens"] == 3 and figures["top1_share"] == 0.75


# ----------------------------------------------------------------------------------- through HF's own flags
def test_evaluate_uses_the_weights_of_now_and_max_eval_users(make_trainer, shop):
    trainer = make_trainer(max_eval_users=7, max_completion_length=4)
    first = trainer.evaluate()
    assert set(first) >= {"eval_recommendation/ndcg@10", "eval_recommendation/masked_ndcg@10"}
    assert trainer.evaluate_frame(shop["validation"].select(range(7)))["rank"].len() == 7
    ranks = trainer.evaluate_frame(shop["validation"].select(range(7)))["rank"].to_numpy()
    assert first["eval_recommendation/ndcg@10"] == pytest.approx(ndcg_at_k(ranks, 10).mean())
    rows = trainer.table.rows
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    trainer.evaluate()
    assert not torch.allclose(trainer.table.rows, rows)
    assert trainer.evaluate(shop["test"].select([0]), metric_key_prefix="test")["test_recommendation/hit@20"] in (0, 1)
    trainer.eval_dataset = None
    with pytest.raises(UserError, match="eval_dataset"):
        trainer.evaluate()


def test_evaluating_changes_neither_mode_nor_training(make_trainer):
    logs = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            eval_strategy=strategy, eval_steps=1, max_steps=3, max_eval_users=3, table_refresh_budget=9.0
        )
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert trainer.model.training
    assert logs[0] == logs[1]


def test_best_model_and_early_stopping_by_hfs_flags(make_trainer, monkeypatch):
    """NDCG falls from the second evaluation on: stop two later, and give back the weights of the first."""
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=8,
        max_eval_users=2,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    weights, inner = [], trainer.evaluate_frame

    def falling(dataset, reasoning=None):
        parameters = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        weights.append(parameters)
        rank = len(weights)
        return inner(dataset, reasoning).with_columns(rank=pl.lit(rank))

    trainer.evaluate_frame = falling
    trainer.train()
    assert trainer.state.global_step == 3 and len(weights) == 3
    assert trainer.state.best_global_step == 1 and trainer.state.best_metric == pytest.approx(1.0)
    now = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(now, weights[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(now, weights[2], strict=True))


# ----------------------------------------------------------------------------------- users and processes
def test_who_bought_nothing_is_answered_as_themselves_among_others(recommender, shop):
    model, prompts, table = recommender
    first, second = shop["test"].select([0, 1]).to_list()
    nobody = {**first, "history": [], "history_ratings": [], "history_timestamps": []}
    users = [second, nobody, first]
    together = evaluate_users(model, prompts, table, shop["test"].from_list(users), 3, 0.05)
    alone = [evaluate_users(model, prompts, table, shop["test"].from_list([user]), 3, 0.05) for user in users]
    columns = ["user_id", "rank", "rank_masked", "reasoning", "top_item_ids"]
    assert together[columns].equals(pl.concat(alone)[columns])
    assert together["logprob"].to_list() == pytest.approx(pl.concat(alone)["logprob"].to_list(), abs=1e-4)


def test_rows_of_several_processes_come_back_in_order(monkeypatch):
    """Two of three processes have rows of five: 0 3, 1 4; the third has row 2 alone; of two rows it has none."""
    accelerators = [SimpleNamespace(process_index=index, num_processes=3) for index in range(3)]
    for count in (5, 2):
        dataset = Dataset.from_dict({"user_id": [f"u{row}" for row in range(count)]})
        frames = [own_rows(dataset, one).to_polars() for one in accelerators]
        assert [frame.height for frame in frames] == ([2, 2, 1] if count == 5 else [1, 1, 1])
        monkeypatch.setattr("r2ec_trl.evaluation.users.gather_object", lambda mine: frames)
        assert gather_rows(frames[0], count)["user_id"].to_list() == dataset["user_id"][:]


def test_the_interval_draws_users_with_all_their_rows():
    """One user with ten hits, ten with a miss each: as rows the interval would lie between .28 and .72."""
    frame = pl.DataFrame(
        {
            "user_id": ["heavy"] * 10 + [f"light{user}" for user in range(10)],
            "rank": [1] * 10 + [99] * 10,
            "rank_masked": [99] * 10 + [1] * 10,
            "has_marker": [True] * 20,
            "reasoning_tokens": [0] * 20,
            "top_item_ids": [["a"]] * 20,
        }
    )
    figures = summarise_users(frame)
    assert (figures["ndcg@10_low"], figures["ndcg@10_high"]) == (0, pytest.approx(30 / 38))
    assert (figures["masked_ndcg@10_low"], figures["masked_ndcg@10_high"]) == (pytest.approx(8 / 38), 1)
