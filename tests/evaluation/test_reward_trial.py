"""Rewards on kept rollouts: figures by hand, what a reward is given in training and no more, broken files."""

import polars as pl
import pytest
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import write_frame
from r2ec_trl.evaluation.reward_trial import read_rollouts, rewards_of, rollout_rows, try_rewards
from r2ec_trl.evaluation.sampling import sample_users
from r2ec_trl.rewards import fused_reward, ndcg_reward


def rollouts(ranks=((1, 3), (2, 2)), texts=("a", "bb", "ccc", "dddd")):
    flat = [rank for group in ranks for rank in group]
    return pl.DataFrame(
        {
            "row": [row for row, group in enumerate(ranks) for _ in group],
            "user_id": [f"u{row}" for row, group in enumerate(ranks) for _ in group],
            "target": ["i"] * len(flat),
            "rank": flat,
            "target_prob": [0.1] * len(flat),
            "target_score": [0.5] * len(flat),
            "top_item_ids": [["i"]] * len(flat),
            "completion": list(texts),
            "prompt": [[{"role": "user", "content": "x"}]] * len(flat),
            "colour": ["red"] * len(flat),
        }
    )


def test_figures_by_hand():
    """NDCG of ranks 1 and 3 is 1 and .5: spread .354; the other group has none."""
    found = try_rewards(rollouts(), {"ndcg": ndcg_reward})["ndcg"]
    assert found["mean"] == pytest.approx((1 + 0.5 + 2 * 0.63093) / 4, abs=1e-5)
    assert found["spread"] == pytest.approx(0.35355 / 2, abs=1e-5) and found["without_signal"] == 0.5
    assert found["with_fused"] == pytest.approx(1) and found["with_rank"] == pytest.approx(1)
    assert found["not_applicable"] == 0
    assert found["up"] == [{"user_id": "u0", "completion": "a", "rank": 1, "reward": 1.0, "advantage": 0.25}]
    assert [row["completion"] for row in found["down"]] == ["bb"] and found["down"][0]["advantage"] == -0.25


def test_a_reward_of_length_turns_the_ranking_round():
    def long(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    found = try_rewards(rollouts(), {"long": long})["long"]
    assert found["with_rank"] < 0.4 and found["without_signal"] == 0
    assert {row["completion"] for row in found["up"]} == {"bb", "dddd"}


def test_no_signal_and_not_applicable():
    def sometimes(completions, **kwargs):
        return [None, None, 1.0, 1.0]

    found = try_rewards(rollouts(), {"sometimes": sometimes})["sometimes"]
    assert found["without_signal"] == 1 and found["not_applicable"] == 0.5 and found["with_rank"] is None
    assert found["up"] == found["down"] == []


async def later(completions, target_rank, **kwargs):
    return [1.0 / rank for rank in target_rank]


def test_an_async_reward_is_awaited():
    assert rewards_of(rollouts(), later).tolist() == [1.0, 1 / 3, 0.5, 0.5]


def test_a_reward_gets_what_training_gives_and_nothing_else():
    seen = {}

    def look(**kwargs):
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    rewards_of(rollouts().with_columns(log_likelihood=0.0, reasoning=pl.lit("x")), look)
    own = {"completions", "prompts", "user_id", "target", "target_rank", "target_prob", "target_score"}
    assert set(seen) == own | {"top_item_ids", "colour"}
    assert seen["completions"][1] == [{"role": "assistant", "content": "bb"}]
    assert seen["prompts"][0] == [{"role": "user", "content": "x"}]


def test_from_a_model_through_a_file_and_back(recommender, shop, tmp_path):
    model, prompts, table = recommender
    users = shop["validation"].select([4, 1])
    samples, _ = sample_users(model, prompts, table, users, 3, 4, 0.05)
    rows = rollout_rows(samples, users, prompts, len(table))
    assert rows["history"].to_list() == [users["history"][i] for i in (0, 0, 0, 1, 1, 1)]
    assert rows["num_items"].unique().to_list() == [40]
    write_frame(tmp_path / "r.parquet", rows, {"settings": {"max_completion_length": 4}})
    again, protocol = read_rollouts(tmp_path / "r.parquet")
    assert again.equals(rows) and protocol == {"settings": {"max_completion_length": 4}}
    assert rewards_of(again, fused_reward).tolist() == pytest.approx(
        fused_reward([], samples["rank"].to_list(), samples["target_prob"].to_list())
    )
    shadowed = users.add_column("completions", ["x", "y"]).add_column("num_items", [1, 2])
    assert rollout_rows(samples, shadowed, prompts, 40).equals(rows)  # as in training
    with pytest.raises(UserError, match="column 'rank' bears a name"):
        rollout_rows(samples, users.add_column("rank", [1, 2]), prompts, 40)


def test_files_that_are_none(tmp_path):
    (tmp_path / "text").write_text("x")
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    write_frame(tmp_path / "less.parquet", rollouts().drop("rank"), {})
    write_frame(tmp_path / "empty.parquet", rollouts().clear(), {})
    for number, facts in enumerate(({}, {"settings": 3}, {"settings": {"max_completion_length": "4"}})):
        write_frame(tmp_path / f"{number}.parquet", rollouts(), facts)
        with pytest.raises(UserError, match="no `max_completion_length` in its protocol"):
            read_rollouts(tmp_path / f"{number}.parquet")
    for name, word in {
        "text": "no file",
        "other.parquet": "no file",
        "less.parquet": "rank",
        "empty.parquet": "no rollouts",
    }.items():
        with pytest.raises(UserError, match=word):
            read_rollouts(tmp_path / name)
