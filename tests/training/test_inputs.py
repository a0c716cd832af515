"""What a trainer is given: right, or one sentence when it is made."""

import importlib.util
import logging

import pytest
import trl
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig, ContrastiveTrainer
from r2ec_trl.training.inputs import numbered
from r2ec_trl.training.recpo_trainer import RecPOTrainer


@pytest.fixture
def words(replay, chat_tokenizer):
    """Rollouts need no model: two words and the marker."""
    marker = chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]
    return replay(lambda prompt_ids, number: [50 + number, 60, *marker])


def column(dataset, name, values):
    return dataset.remove_columns(name).add_column(name, values)


@pytest.mark.parametrize("name", ["user_id", "history", "target"])
@pytest.mark.parametrize("which", ["train", "validation"])
def test_a_missing_column_is_named(make_trainer, shop, name, which):
    argument = {"train": "train_dataset", "validation": "eval_dataset"}[which]
    with pytest.raises(UserError, match=f"`{argument}` has no column `{name}`"):
        make_trainer(**{which: shop[which].remove_columns(name)})


def test_what_is_no_dataset_is_refused(make_trainer, shop):
    for wrong in (shop["train"].to_iterable_dataset(), shop["train"].to_list(), {"a": shop["train"]}):
        with pytest.raises(UserError, match="`train_dataset` is a (IterableDataset|list|dict); give a `datasets.Data"):
            make_trainer(train=wrong)
    with pytest.raises(UserError, match="is a DatasetDict; .*one of its splits: train, validation, test, items"):
        make_trainer(train=shop)
    with pytest.raises(UserError, match="is a DataFrame; .*`Dataset.from_pandas` or `Dataset.from_polars` makes one"):
        make_trainer(train=shop["train"].to_polars())
    with pytest.raises(UserError, match="`eval_dataset` is a IterableDataset"):
        make_trainer(validation=shop["validation"].to_iterable_dataset())


def test_an_item_without_a_title_is_named(shop, chat_tokenizer, make_trainer):
    made = make_trainer()
    for title in (None, "  "):
        items = column(shop["items"], "title", ["a", title, *shop["items"]["title"][2:]])
        with pytest.raises(UserError, match="`item_dataset`, row 1: no `title`"):
            RecPOTrainer(made.model, items, None, made.args, shop["train"], None, chat_tokenizer)
    with pytest.raises(UserError, match="`item_dataset` has no column `title`"):
        RecPOTrainer(made.model, items.remove_columns("title"), None, made.args, shop["train"], None, chat_tokenizer)


def test_a_target_outside_the_catalogue_is_named_before_anything_is_trained(make_trainer, shop):
    train = column(shop["train"], "target", ["i99", *shop["train"]["target"][1:]])
    with pytest.raises(UserError, match="`train_dataset`, row 0: target 'i99' is not in the catalogue"):
        make_trainer(train=train)


def test_what_would_only_fail_in_an_evaluation_is_refused_at_the_start(make_trainer, tiny_model, shop):
    """A purchase outside the catalogue; a history of validation that is longer than any of training."""
    rows = shop["validation"].to_list()
    rows[1]["history"] = [*rows[1]["history"][1:], "i99"]
    with pytest.raises(UserError, match="`eval_dataset`, row 1: item 'i99' of the history is not in the catalogue"):
        make_trainer(validation=Dataset.from_list(rows))
    rows = [{name: row[name] for name in ("user_id", "history", "target")} for row in shop["validation"].to_list()]
    rows[3]["history"] = rows[3]["history"] * 12
    options = {"validation": Dataset.from_list(rows), "max_history_items": 60, "eval_steps": 1}
    model = tiny_model("llama", max_position_embeddings=200)
    make_trainer(model=model, **options)  # nothing is evaluated
    make_trainer(model=model, eval_strategy="steps", max_eval_users=3, **options)
    with pytest.raises(UserError, match="prompt of an evaluation .* but the model has 200 positions"):
        make_trainer(model=model, eval_strategy="steps", **options)


def test_settings_of_another_trainer_are_refused(make_trainer, shop, chat_tokenizer, tmp_path, tiny_model):
    plain = trl.GRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, num_generations=4)
    for trainer, kind, more in (
        (RecPOTrainer, "RecPOConfig", [None]),
        (ContrastiveTrainer, "ContrastiveConfig", []),
    ):
        with pytest.raises(UserError, match=f"`args` is a GRPOConfig; give a {kind}"):
            trainer(tiny_model("llama"), shop["items"], *more, plain, shop["train"], None, chat_tokenizer)


def test_reporters_are_checked_at_the_start(make_trainer):
    assert make_trainer(report_to=None).args.report_to == []
    with pytest.raises(UserError, match="`report_to` names 'nowhere'"):
        make_trainer(report_to="nowhere")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="`report_to` names 'wandb'.*pip install wandb"):
            make_trainer(report_to="wandb")


def test_the_figure_that_chooses_must_be_one_that_evaluations_give(make_trainer, shop):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(UserError, match="`metric_for_best_model` is 'eval_reward'.*recommendation/ndcg@10"):
        make_trainer(metric_for_best_model="eval_reward", **evaluating)
    make_trainer(metric_for_best_model="eval_recommendation/masked_mrr@20", **evaluating)
    sets = {"new": shop["validation"], "old": shop["test"]}
    assert make_trainer(validation=sets, **evaluating).args.metric_for_best_model == "new_recommendation/ndcg@10"
    chosen = make_trainer(validation=sets, metric_for_best_model="eval_old_recommendation/hit@5", **evaluating)
    assert chosen.args.metric_for_best_model == "eval_old_recommendation/hit@5"


def test_each_of_several_evaluation_sets_has_its_figures(make_trainer, shop, words):
    """Ten and three users: the sets are told apart by their figures, which are those of each alone."""
    sets = {"all": shop["validation"], "few": shop["test"].select(range(3))}
    trainer = make_trainer(validation=sets, max_completion_length=2, eval_strategy="steps", eval_steps=1)
    figures = trainer.evaluate()
    for name, users in sets.items():
        alone = trainer.evaluate(users)
        for key, value in alone.items():
            if "time" not in key and "/" in key:
                assert figures[key.replace("eval_", f"eval_{name}_", 1)] == pytest.approx(value), key


@pytest.mark.parametrize("name", ["image", "images"])
def test_a_column_of_picture_addresses_makes_no_vision_model(make_trainer, shop, words, name):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(kwargs[name])
        return [0.1 * i for i in range(len(completions))]

    rows = shop["train"].select(range(2)).add_column(name, [["http://x/1.jpg"], []])
    make_trainer(train=rows, reward=reward, max_steps=1).train()
    assert sorted(map(str, seen)) == ["['http://x/1.jpg']"] * 4 + ["[]"] * 4


def test_a_prompt_column_is_replaced_and_that_is_said(make_trainer, shop, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(train=shop["train"].add_column("prompt", ["mine"] * 40))
    assert "column `prompt` of `train_dataset` is replaced" in caplog.text
    assert trainer.train_dataset["prompt"][0][-1]["content"].startswith("Bought")


def test_a_column_that_rewards_get_by_another_name_is_left_out_and_that_is_said(make_trainer, shop, caplog):
    """Else `completions` ends the first step, and the others are replaced without a word."""
    rows = shop["train"].add_column("completions", ["mine"] * 40).add_column("num_items", [7] * 40)
    seen = []

    def reward(completions, num_items, **kwargs):
        seen.extend(num_items)
        return [0.1 * i for i in range(len(completions))]

    with caplog.at_level(logging.WARNING):
        make_trainer(train=rows, reward=reward, max_steps=1).train()
    assert set(seen) == {40} and all(f"column `{name}` of" in caplog.text for name in ("completions", "num_items"))


@pytest.mark.parametrize("value", ["i00", None])
def test_a_history_that_is_no_list_is_named(make_trainer, shop, value):
    histories = [value] * 40 if value else [None, *shop["train"]["history"][1:]]
    with pytest.raises(UserError, match="`train_dataset`, row 0: history .* is no list of item ids"):
        make_trainer(train=column(shop["train"], "history", histories))


def test_an_empty_evaluation_set_is_refused_at_the_start(make_trainer, shop):
    for users in (shop["validation"].select([]), {"a": shop["validation"], "b": shop["test"].select([])}):
        with pytest.raises(UserError, match=r"`eval_dataset.*` is empty; give at least one user"):
            make_trainer(validation=users)


def test_users_of_a_later_evaluation_are_checked_as_the_first_ones(make_trainer, shop):
    trainer = make_trainer(validation={"a": shop["validation"], "b": shop["test"]}, max_completion_length=2)
    with pytest.raises(UserError, match="`eval_dataset` has no column `target`"):
        trainer.evaluate(shop["test"].remove_columns("target"))
    with pytest.raises(UserError, match="`evaluate` has no users"):
        trainer.evaluate("c")
    assert trainer.evaluate("b") == trainer.evaluate(shop["test"])


def test_a_dataset_in_another_format_trains_the_same(make_trainer, shop, words):
    losses = []
    for train in (shop["train"], shop["train"].with_format("torch"), shop["train"].with_format("numpy")):
        words.clear()
        trainer = make_trainer(train=train, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1] == losses[2]
    assert trainer.evaluate_frame(shop["validation"].with_format("torch")).height == 10


# ----------------------------------------------------------------------------------------------------------- rewards
def test_rewards_of_one_name_have_a_figure_each(make_trainer, words):
    def rewards(value):
        def reward(completions, **kwargs):
            return [value] * len(completions)

        return reward

    trainer = make_trainer(reward=(rewards(1.0), "hit", rewards(0.0)), max_steps=1)  # a tuple will do
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/reward_1/mean"], log["rewards/reward_2/mean"]) == (1.0, 0.0)
    assert "rewards/hit_reward/mean" in log and "rewards/reward/mean" not in log
    assert numbered(["a", "b", "a", "a"]) == ["a_1", "b", "a_2", "a_3"]
    assert numbered(["a", "a", "a_1"]) == ["a_2", "a_3", "a_1"]  # which has that name by itself


def test_a_reward_gets_what_it_names(make_trainer, words):
    def by_rank(completions, target_rank):
        return [1.0 / rank for rank in target_rank]

    trainer = make_trainer(reward=by_rank, max_steps=1)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["reward"] <= 1


def test_a_reward_that_cannot_work_is_named(make_trainer, words):
    def asks(completions, price):
        return price

    def gives_a_dict(completions, **kwargs):
        return {i: 1.0 for i in range(len(completions))}

    def gives_nothing(completions, **kwargs):
        return None

    for reward, sentence in {
        asks: "'asks' asks for 'price'",
        gives_a_dict: "returned a dict",
        gives_nothing: "returned a NoneType",
    }.items():
        with pytest.raises(UserError, match=sentence):
            make_trainer(reward=reward).train()
    with pytest.raises(UserError, match="`reward_funcs` holds a int"):
        make_trainer(reward=[3])
    with pytest.raises(UserError, match="`reward_funcs` is an empty list"):
        make_trainer(reward=[])


def test_the_warm_start_is_checked_alike(shop, tiny_model, chat_tokenizer, tmp_path):
    args = ContrastiveConfig(str(tmp_path), report_to="none", use_cpu=True, eval_strategy="steps", eval_steps=1)
    parts = (tiny_model("llama"), shop["items"], args)
    with pytest.raises(UserError, match="there is no `eval_dataset`"):
        ContrastiveTrainer(*parts, shop["train"], None, chat_tokenizer)
    with pytest.raises(UserError, match="`train_dataset` has no column `target`"):
        ContrastiveTrainer(*parts, shop["train"].remove_columns("target"), shop["validation"], chat_tokenizer)
    with pytest.raises(UserError, match="`eval_dataset` is an empty dict"):
        ContrastiveTrainer(*parts, shop["train"], {}, chat_tokenizer)


def test_the_warm_start_loads_what_is_not_given(shop, tiny_model_folder, tmp_path):
    args = ContrastiveConfig(str(tmp_path), report_to="none", use_cpu=True)
    trainer = ContrastiveTrainer(str(tiny_model_folder("llama")), shop["items"], args, shop["train"])
    assert trainer.processing_class.chat_template and trainer.model.config.num_hidden_layers == 2
