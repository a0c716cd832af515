"""RecPOConfig: the paper's defaults, and settings that would silently mean something else are refused."""

import dataclasses
import inspect

import pytest
from trl import GRPOConfig

from r2ec_trl.cli.bundle_choice import BundleArguments
from r2ec_trl.errors import UserError
from r2ec_trl.policy import settings as shared_settings
from r2ec_trl.policy.prompts import PromptConfig
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.launch import settle_checkpointing
from r2ec_trl.training.recpo_config import RecPOConfig


@pytest.fixture
def config(tmp_path):
    return lambda **settings: RecPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_defaults_are_the_papers(config):
    args = config()
    paper = {
        "learning_rate": 1e-5,
        "num_train_epochs": 3,
        "warmup_steps": 32,
        "num_generations": 4,
        "temperature": 1.5,
        "top_k": 200,
        "epsilon": 0.2,
        "beta": 0.0,
        "reward_mix": 0.05,
        "reward_cutoff": 1000,
        "item_temperature": 0.02,
        "item_coef": 1.0,
        "token_coef": 1.0,
        "item_credit": "best",
        "item_negatives": "batch",
        "item_gradient": "candidates",
        "similarity": "cosine",
        "advantage": "grpo",
        "mask_history": False,
        "disable_dropout": True,
        "max_history_items": 20,
        "max_prompt_length": 2048,
        "max_item_length": 768,
    }
    assert {name: getattr(args, name) for name in paper} == paper
    assert args.epsilon_high is None  # TRL: the same as epsilon
    assert args.loss_type == "dapo"  # the normalisation that the item term shares
    assert args.bf16 is False  # no GPU here


def test_prompt_fields_reach_the_prompts(config):
    names = {field.name for field in dataclasses.fields(PromptConfig)}
    assert names <= {field.name for field in dataclasses.fields(RecPOConfig)}
    args = config(category="song", item_fields=["title"], marker="###", use_times=False)
    expected = PromptConfig(category="song", item_fields=("title",), marker="###", use_times=False)
    assert args.prompt_config() == expected
    assert config().prompt_config() == PromptConfig()


@pytest.mark.parametrize("credit, count", [("best", 1), ("all", None), ("2", 2), (3, 3)])
def test_item_credit(config, credit, count):
    assert config(item_credit=credit).item_credit_count == count


def test_best_model_is_chosen_by_validation_ndcg(config):
    args = config()
    assert (args.metric_for_best_model, args.greater_is_better) == ("recommendation/ndcg@10", True)
    assert config(selection_mask=True).metric_for_best_model == "recommendation/masked_ndcg@10"
    kept = config(metric_for_best_model="recommendation/missing_marker", greater_is_better=False)
    assert (kept.metric_for_best_model, kept.greater_is_better) == ("recommendation/missing_marker", False)


def test_importance_correction_is_off_under_truncated_sampling(config):
    assert config().vllm_importance_sampling_correction is False  # top_k = 200
    assert config(top_k=0).vllm_importance_sampling_correction is True
    assert config(top_k=0, top_p=0.9).vllm_importance_sampling_correction is False
    assert config(top_k=0, min_p=0.1).vllm_importance_sampling_correction is False
    assert config(vllm_importance_sampling_correction=True).vllm_importance_sampling_correction is True
    assert config().vllm_importance_sampling_mode == "token_truncate"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"similarity": "euclid"}, "similarity.*cosine, dot"),
        ({"advantage": "ppo"}, "advantage.*grpo, rloo"),
        ({"item_negatives": "none"}, "item_negatives"),
        ({"item_gradient": "all"}, "item_gradient"),
        ({"item_credit": "0"}, "item_credit"),
        ({"item_credit": "worst"}, "item_credit"),
        ({"advantage": "rloo"}, "--scale_rewards none"),
        (
            {"advantage": "rloo", "scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation",
        ),
        ({"reward_mix": 1.5}, "reward_mix"),
        ({"reward_cutoff": 0}, "reward_cutoff"),
        ({"table_refresh_budget": -1.0}, "table_refresh_budget"),
        ({"item_temperature": 0.0}, "item_temperature"),
        ({"max_eval_users": 0}, "max_eval_users"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"slice_table": True, "item_negatives": "catalogue"}, "slice_table"),
    ],
)
def test_refuses(config, settings, words):
    with pytest.raises(UserError, match=words):
        config(**settings)


def test_only_paper_values_differ_from_trl():
    ours = {field.name: field.default for field in dataclasses.fields(RecPOConfig)}
    changed = {f.name for f in dataclasses.fields(GRPOConfig) if ours[f.name] != f.default}
    assert changed <= {
        "optim",
        "learning_rate",
        "num_train_epochs",
        "warmup_steps",
        "num_generations",
        "num_generations_eval",
        "temperature",
        "top_k",
        "disable_dropout",
        "gradient_checkpointing",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
    }


def test_every_field_has_help():
    ours = {f.name for f in dataclasses.fields(RecPOConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    missing = [f.name for f in dataclasses.fields(RecPOConfig) if f.name in ours and not f.metadata.get("help")]
    assert not missing


def test_each_prompt_field_is_stated_once():
    """What PromptConfig says of a field (default, help) is what every command line says; only the category waits."""
    stated = {f.name: f for f in dataclasses.fields(PromptConfig)}
    for kind in (RecPOConfig, ContrastiveConfig, BundleArguments):
        flags = {f.name: f for f in dataclasses.fields(kind)}
        for name, field in stated.items():
            default = flags[name].default_factory() if isinstance(field.default, tuple) else flags[name].default
            expected = list(field.default) if isinstance(field.default, tuple) else field.default
            assert default == (None if name == "category" else expected), name
            assert flags[name].metadata["help"] == field.metadata["help"]
    source = inspect.getsource(shared_settings)
    assert [name for name in stated if f"    {name}: " in source] == ["category"]


def test_checkpointing_takes_auto_and_both_truths(config):
    """Settled without a plan: off on a CPU, whose memory holds a step; what was asked for stays."""
    for given, settled in {"auto": False, True: True, "true": True, "False": False}.items():
        args = config(gradient_checkpointing=given)
        settle_checkpointing(args)
        assert args.gradient_checkpointing is settled
    for fits in (True, False):
        args = config()
        settle_checkpointing(args, fits)
        assert args.gradient_checkpointing is not fits
    with pytest.raises(UserError, match="'perhaps'.*auto, true or false"):
        config(gradient_checkpointing="perhaps")


def test_options_that_reach_half_of_the_loss_are_refused(config):
    """Quiet rows set the quantile of entropies; dropped rollouts would keep their items."""
    with pytest.raises(UserError, match="`min_reward_spread` leaves rows out"):
        config(min_reward_spread=0.1, top_entropy_quantile=0.5)
    with pytest.raises(UserError, match="`off_policy_mask_threshold` drops rollouts"):
        config(off_policy_mask_threshold=0.5, item_credit="all")
    config(off_policy_mask_threshold=0.5, item_credit="all", item_coef=0.0)
    config(off_policy_mask_threshold=0.5)
