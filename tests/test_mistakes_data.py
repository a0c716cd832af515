"""
The mistakes of the reference, the part of scoring, prompts, data and flags; see test_mistakes.py. `goes_red` runs the
same check with the mistake put back.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from oracle import goes_red

import r2ec_trl.items.scoring as scoring
from r2ec_trl.cli.parsing import RecipeParser, parse
from r2ec_trl.errors import UserError
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.chat import Chat
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.training.recpo_config import RecPOConfig


@pytest.fixture
def sample(chat_tokenizer):
    """Rollouts of different lengths, each with the marker."""
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]

    def draw(prompt_ids, number):
        dice = random.Random(f"{prompt_ids}{number}")
        return [dice.randrange(10, 300) for _ in range(dice.randrange(2, 8))] + marker

    return draw


def test_6_scores_are_fp32_and_a_tie_counts_against_the_target(monkeypatch):
    """In bf16 at cosines near .9, ten thousand items share a few dozen values."""
    torch.manual_seed(0)
    centre = torch.randn(64)
    rows = torch.nn.functional.normalize(centre + 0.5 * torch.randn(10_000, 64), dim=1)
    states = torch.nn.functional.normalize(centre + 0.5 * torch.randn(20, 64), dim=1)
    targets = torch.arange(20)

    def check():
        exact = states.double() @ rows.double().T
        expected = 1 + (exact > exact[targets, targets][:, None]).sum(dim=1)
        ranks = scoring.target_rank_and_logprob(states, rows, targets, temperature=0.02).rank
        assert ranks.tolist() == expected.tolist()
        twins = torch.cat([rows[:20], rows])  # every target has an equal: it stands behind it
        tied = scoring.target_rank_and_logprob(states, twins, targets, temperature=0.02).rank
        assert (tied - expected >= 1).all()

    check()
    monkeypatch.setattr(scoring, "_scores", lambda states, rows: (states.bfloat16() @ rows.bfloat16().T).float())
    with goes_red():
        check()


@pytest.mark.parametrize("cutoff", [1, 1000])
def test_7_small_catalogues_ragged_batches_and_cutoff_one(make_trainer, replay, sample, cutoff):
    """40 items under a cutoff of 1000, and 7 users in batches of 5 when evaluating."""
    replay(sample)
    trainer = make_trainer(reward="ndcg", reward_cutoff=cutoff, forward_token_budget=300, max_steps=1)
    trainer.train()
    ranks = trainer.evaluate_frame(trainer.eval_dataset.select(range(7)))["rank"]
    assert len(ranks) == 7 and all(1 <= rank <= 40 for rank in ranks)
    assert all(0 <= reward <= 1 for reward in trainer.batch.rewards.flatten().tolist())


def test_13_truncation_keeps_the_generation_prompt_the_marker_and_the_newest_purchase(
    shop, chat_tokenizer, monkeypatch
):
    def check():
        prompts = Prompts(chat_tokenizer, PromptConfig(max_prompt_length=300, max_item_length=90), shop["items"])
        example = {"user_id": "u", "history": [f"i{n:02d}" for n in range(20)], "target": "i30"}
        ids = prompts.user_ids(example)
        text = chat_tokenizer.decode(ids)
        assert len(ids) <= 300 and text.endswith("<|assistant|>\n") and "[violin book]" in text
        assert text.startswith("<|user|>\nThink in depth") and "[guitar strings]" not in text
        item = prompts.item_ids({**shop["items"][0], "description": "long " * 90})
        assert len(item) <= 90 and item[-len(prompts.marker_ids) :] == prompts.marker_ids

    check()
    inner = Chat.ids
    monkeypatch.setattr(Chat, "ids", lambda self, messages: inner(self, messages)[:90])
    with goes_red():
        check()


def test_16_the_history_mask_is_a_switch_and_both_figures_are_told(make_trainer, replay, sample, shop):
    repeats = [{**row, "target": row["history"][0]} for row in shop["train"].select(range(8))]
    ranks = {}
    for mask in (False, True):
        replay(sample)
        trainer = make_trainer(train=Dataset.from_list(repeats), mask_history=mask, max_steps=1, item_coef=0.0)
        inner, seen = trainer.telemetry.recommendations, []
        trainer.telemetry.recommendations = lambda titles, rows, *rest: (
            seen.extend(rows),
            inner(titles, rows, *rest),
        )
        trainer.train()
        ranks[mask] = [row["target_rank"] for row in seen]
        shown = [set(row["top_item_ids"]) & set(row["history"]) for row in seen]
        assert any(shown) != mask  # items of the history are recommended, or not
    assert all(masked <= plain for masked, plain in zip(ranks[True], ranks[False], strict=True))
    assert len(ranks[True]) == 8 and max(ranks[True]) <= 40  # in training the target itself stays, a repeat too
    figures = make_trainer(max_completion_length=2, max_eval_users=3).evaluate()
    assert {"eval_recommendation/ndcg@10", "eval_recommendation/masked_ndcg@10"} <= figures.keys()


def test_17_padding_is_no_row_of_the_table(make_trainer, replay, sample, shop, monkeypatch):
    def check():
        replay(sample)
        trainer = make_trainer(max_steps=1)
        trainer.train()
        assert len(trainer.table) == len(trainer.table.rows) == len(shop["items"])
        state = trainer.table.rows[:1]
        every = scoring.top_k(state, trainer.table.rows, 10_000)[1][0].tolist()
        assert sorted(every) == list(range(40))
        scores = [
            scoring.target_rank_and_logprob(state, trainer.table.rows, torch.tensor([row]), temperature=0.05)
            for row in range(40)
        ]
        assert sum(score.logprob.exp().item() for score in scores) == pytest.approx(1.0, abs=1e-4)

    check()
    inner = ItemTable.refresh

    def with_pad(self, encoder, indices=None):
        inner(self, encoder, indices)
        self._rows = torch.cat([self._rows, torch.zeros(1, self._rows.shape[1])])

    monkeypatch.setattr(ItemTable, "refresh", with_pad)
    with goes_red():
        check()


def test_18_item_text_keeps_its_order_and_leaks_no_later_figures(shop, chat_tokenizer, monkeypatch):
    """Crawled ratings and numbers of buyers are columns like others: shown when asked for only."""
    columns = ["title", "brand", "description", "average_rating", "rating_number", "store", "features"]
    item = {"item_id": "i00", **{name: f"{name}-text" for name in columns}}

    def text(**settings):
        prompts = Prompts(chat_tokenizer, PromptConfig(item_template="{fields}", **settings), shop["items"])
        return [line.split(": ")[-1] for line in chat_tokenizer.decode(prompts.item_ids(item)).splitlines()[1:-2]]

    def check():
        dice = random.Random(0)
        for _ in range(5):
            dice.shuffle(columns)
            assert text(item_fields=columns) == [f"{name}-text" for name in columns]
        assert text() == ["title-text", "description-text"]

    check()
    inner = PromptConfig.__post_init__

    def unordered(self):
        inner(self)
        object.__setattr__(self, "item_fields", tuple(sorted(set(self.item_fields))))

    monkeypatch.setattr(PromptConfig, "__post_init__", unordered)
    with goes_red():
        check()


class ExplodingDataset(Dataset):
    """A split that nobody may look at."""

    def __getitem__(self, key):
        raise AssertionError("the test split was touched")

    def __iter__(self):
        raise AssertionError("the test split was touched")

    def select(self, *args, **kwargs):
        raise AssertionError("the test split was touched")


@pytest.fixture
def recpo(monkeypatch, shop, tiny_model, chat_tokenizer, tmp_path):
    """recipes/recpo.py on the shop, its end left out; `recpo(test)` trains with that test split."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    import recpo

    words = "--max_steps 2 --per_device_train_batch_size 4 --num_generations 2 --max_completion_length 3"
    words += " --load_best_model_at_end false --eval_strategy steps --eval_steps 1 --max_eval_users 3"
    words += (
        " --save_strategy no --report_before false --report_to none --use_cpu true --bf16 false --item_fields title"
    )
    monkeypatch.setattr(sys, "argv", ["recpo.py", *words.split(), "--output_dir", str(tmp_path / "run")])
    monkeypatch.setattr(recpo, "load_policy", lambda *a, **k: (tiny_model("llama"), chat_tokenizer))
    monkeypatch.setattr(recpo, "train_and_finish", lambda trainer, *a: trainer.train())

    def train(**splits):
        card = {"category": "product"}
        monkeypatch.setattr(recpo, "load_dataset", lambda *a: ({**shop, **splits}, card))
        recpo.main()

    return train


def test_20_the_test_split_is_not_touched_while_training(recpo, shop):
    """The recipe evaluates users of validation alone: with another split in its place it would touch that."""
    untouchable = ExplodingDataset(shop["test"].data, info=shop["test"].info)
    recpo(test=untouchable)
    with goes_red():
        recpo(validation=untouchable)


@pytest.mark.parametrize("category", ["left-handed guitar string", "CD", "映画", "{history}"])
def test_21_any_category_name_works(make_trainer, replay, sample, category):
    replay(sample)
    trainer = make_trainer(category=category, max_steps=1)
    assert f"Next {category} after" in trainer.train_dataset[0]["prompt"][0]["content"]
    trainer.train()
    assert trainer.state.global_step == 1


def test_22_unknown_flags_are_errors(tmp_path, monkeypatch):
    def check():
        for words in (["--lora_dropuot", "0.1"], ["--r", "4"], ["--target_modules", "q_proj"]):
            with pytest.raises(UserError, match="unknown flag"):
                try:
                    parse((RecPOConfig, PolicyArguments), ["--output_dir", str(tmp_path), "--use_cpu", "true", *words])
                except UserError:
                    raise
                raise AssertionError(f"{words[0]} was taken")

    check()
    inner = RecipeParser.__mro__[1].parse_known_args
    monkeypatch.setattr(RecipeParser, "parse_known_args", lambda self, *a, **k: (inner(self, *a, **k)[0], []))
    with goes_red():
        check()
