"""Health warnings are fed the logs a trainer would give them."""

import logging
import math
from types import SimpleNamespace

import polars as pl
import pytest
from transformers import TrainerState

from r2ec_trl.training.health import HealthCallback


def _state(step=0, main_process=True, history=()):
    state = TrainerState(global_step=step, max_steps=20, log_history=list(history))
    state.is_world_process_zero = main_process
    return state


def _warnings(caplog, *logs, main_process=True, args=None):
    callback = HealthCallback()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="r2ec_trl.cli.live"):
        for step, row in enumerate(logs, 1):
            callback.on_log(args, _state(step, main_process), None, logs=row)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("logs", "cure"),
    [
        ({"rollout/missing_marker": 0.4}, "--max_completion_length"),
        ({"completions/clipped_ratio": 0.6}, "--mask_truncated_completions"),
        ({"frac_reward_zero_std": 0.6}, "--num_generations"),
        ({"item/mean_pairwise_cosine": 0.97}, "contrastive.py"),
        ({"table/fresh_rank_gain": 0.7}, "--table_refresh_budget"),
        ({"sampling/sampling_logp_difference/mean": 0.2}, "--bf16"),
        ({"eval_recommendation/top1_share": 0.34}, "--item_coef"),
        ({"grad_norm/item": 3.0, "grad_norm/token": 0.17}, "--item_coef"),
    ],
)
def test_health_warns_once_with_the_cure(caplog, logs, cure):
    messages = _warnings(caplog, *[logs] * 5)
    assert len(messages) == 1 and cure in messages[0] and messages[0].startswith("step 2: ")
    assert _warnings(caplog, *[logs] * 5, main_process=False) == []


@pytest.mark.parametrize(
    "logs",
    [
        {"rollout/missing_marker": 0.3, "completions/clipped_ratio": 0.5, "frac_reward_zero_std": 0.5},
        {"item/mean_pairwise_cosine": 0.95, "table/fresh_rank_gain": 0.0, "eval_recommendation/top1_share": 0.3},
        {"grad_norm/item": 1.6, "grad_norm/token": 0.17},
        {"grad_norm/item": 1.6, "grad_norm/token": 0.0},
        {"grad_norm/item": 1.6},
        {"reward": 1.0, "frac_reward_zero_std": None, "rollout/missing_marker": math.nan},
    ],
)
def test_health_is_silent_at_the_thresholds_and_without_values(caplog, logs):
    assert _warnings(caplog, *[logs] * 5) == []


def test_what_evaluate_logs_sets_the_warning_off(make_trainer, shop, caplog):
    """All users get one first item: `evaluate` itself, twice, with nothing between it and the callback."""
    trainer = make_trainer(callbacks=[HealthCallback()])
    frame = trainer.evaluate_frame(shop["validation"])
    collapsed = frame.with_columns(top_item_ids=pl.Series([["i00", "i01"]] * frame.height))
    with caplog.at_level(logging.WARNING, logger="r2ec_trl.training.health"):
        for shown in (frame.with_columns(top_item_ids=pl.Series([[f"i{row}"] for row in range(10)])), collapsed):
            trainer.evaluate_frame = lambda dataset, shown=shown: shown
            caplog.clear()
            trainer.evaluate()
            trainer.evaluate()
            warned = [record.getMessage() for record in caplog.records if "is first for" in record.getMessage()]
            assert len(warned) == (shown is collapsed)
    assert "first for 40% of the users" in warned[0]  # the mean of the last three: .1, .1, 1


def test_health_forgives_one_noisy_batch(caplog):
    rows = [{"frac_reward_zero_std": value} for value in (0.9, 0.0, 0.3, 0.8, 0.3)]
    assert _warnings(caplog, *rows) == []


def test_a_high_cosine_may_fall_but_not_rise_or_stay(caplog):
    def rows(values):
        return [{"item/mean_pairwise_cosine": value} for value in values]

    assert _warnings(caplog, *rows([0.99, 0.98, 0.97, 0.96, 0.94, 0.9])) == []
    assert len(_warnings(caplog, *rows([0.3, 0.4, 0.45, 0.51]))) == 1
    assert _warnings(caplog, *rows([0.3, 0.4, 0.45, 0.49])) == []
    for negatives in ("batch", "catalogue"):
        args = SimpleNamespace(item_negatives=negatives)
        (said,) = _warnings(caplog, *rows([0.3, 0.4, 0.45, 0.51]), args=args)
        assert ("leave --item_negatives catalogue out" in said) is (negatives == "catalogue")
    assert len(_warnings(caplog, *rows([0.99 - 0.001 * step for step in range(15)]))) == 1
