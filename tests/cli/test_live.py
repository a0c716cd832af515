"""Callbacks are fed the logs a trainer would give them."""

import io
import json
import logging
import math
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from r2ec_trl.cli import learning_curve
from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.cli.live import RecPOProgressCallback
from r2ec_trl.training.health import HealthCallback

EXAMPLE = {
    "user_id": "u7",
    "history_titles": [f"title {number}" for number in range(8)],
    "reasoning": "they need\nstrings [bold]soon",
    "target_title": "guitar strings",
    "rank": 3,
    "top_titles": ["violin case", "drum lamp", "guitar strings"],
}
LOGS = {
    "loss": 0.25,
    "reward": 0.5,
    "rewards/ndcg_reward/mean": 0.4,
    "rewards/target_probability/mean": 0.01,
    "completions/mean_length": 17.0,
    "rollout/missing_marker": 0.125,
    "time/generate": 3.0,
    "time/score": 1.0,
    "reward_std": None,
    "grad_norm": math.nan,
}


def _state(step=0, main_process=True, history=()):
    state = TrainerState(global_step=step, max_steps=20, log_history=list(history))
    state.is_world_process_zero = main_process
    return state


def _show(terminal, main_process=True):
    """A short run with one evaluation; returns all that was written."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    callback = RecPOProgressCallback(lambda: EXAMPLE, console=console)
    callback.on_train_begin(None, _state(main_process=main_process), None)
    for step, logs in enumerate(
        [LOGS, {"eval_recommendation/ndcg@10": 0.31}, {"eval_recommendation/ndcg@10": 0.3}], 1
    ):
        callback.on_step_end(None, _state(step, main_process), None)
        callback.on_log(None, _state(step, main_process), None, logs=logs)
    callback.on_train_end(None, _state(3, main_process), None)
    return console.file.getvalue()


def test_progress_in_a_file_is_plain_lines_without_control_codes():
    text = _show(terminal=False)
    lines = text.splitlines()
    assert "\x1b" not in text and "\r" not in text
    assert lines[0] == (
        "step 1/20 | loss 0.2500 | reward 0.5000 | ndcg_reward 0.4000 | target_probability 0.0100 | "
        "tokens a rollout 17.0 | marker missing 12% | seconds a step: generate 3.00, score 1.00"
    )
    assert lines[1] == "step 2/20 | validation NDCG@10 0.3100"
    assert "  user u7: …, title 3, title 4, title 5, title 6, title 7" in lines
    assert "  reasoning: they need strings [bold]soon" in lines
    assert "  target, rank 3: guitar strings" in lines


def test_progress_on_a_terminal_shows_figures_time_split_and_rollout():
    last = _show(terminal=True).split("RecPO")[-1]
    for text in ("3/20", "reward", "0.5000", "ndcg_reward", "best validation NDCG@10", "0.3100", "75%", "violin case"):
        assert text in last, text
    assert "strings [bold]soon" in last  # the policy's text is no markup


def test_progress_of_other_processes_is_silent():
    assert _show(terminal=True, main_process=False) == "" == _show(terminal=False, main_process=False)


def test_progress_gives_the_terminal_back_when_training_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    callback = RecPOProgressCallback(console=console)
    callback.on_train_begin(None, _state(), None)
    callback.close()  # what atexit calls
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # cursor shown


def test_learning_curve_writes_whole_files_at_evaluation_and_end(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"))
    history = [
        {"step": 1, "reward": 0.1, "rollout/missing_marker": 0.5, "completions/mean_length": 12.0, "kl": math.nan},
        {"step": 2, "eval_recommendation/ndcg@10": 0.2},
        {"step": 3, "reward": None},
    ]
    callback = LearningCurveCallback()
    callback.on_evaluate(args, _state(2, history=history[:2]), None)
    first = (tmp_path / "run" / "learning_curve.png").read_bytes()
    callback.on_train_end(args, _state(3, history=history), None)
    assert first.startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["learning_curve.png", "log_history.json"]
    saved = json.loads((tmp_path / "run" / "log_history.json").read_text())
    assert saved == [{**history[0], "kl": None}, *history[1:]]


def test_learning_curve_draws_the_logged_points():
    history = [{"step": step, "eval_recommendation/ndcg@10": step / 10, "reward": math.nan} for step in (5, 10)]
    ndcg, reward, *_ = LearningCurveCallback().draw(history).axes
    assert ndcg.lines[0].get_xydata().tolist() == [[5, 0.5], [10, 1.0]]
    assert ndcg.lines[0].get_marker() == "o"
    assert not reward.lines and reward.texts[0].get_text() == "not logged"


def test_learning_curve_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback = LearningCurveCallback()
    callback.on_evaluate(args, _state(1, history=[{"step": 1, "reward": 0.1}]), None)
    before = (tmp_path / "log_history.json").read_text()

    def full_disk(path, *args, **kwargs):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learning_curve.Path, "write_text", full_disk)
    with pytest.raises(OSError):
        callback.on_evaluate(args, _state(2, history=[{"step": 1}, {"step": 2}]), None)
    assert (tmp_path / "log_history.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_curve.png", "log_history.json"]


def test_only_the_main_process_writes_and_nothing_before_the_first_log(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path))
    LearningCurveCallback().on_train_end(args, _state(1, main_process=False, history=[{"step": 1}]), None)
    LearningCurveCallback().on_train_end(args, _state(), None)
    assert list(tmp_path.iterdir()) == []


def _warnings(caplog, *logs, main_process=True):
    callback = HealthCallback()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="r2ec_trl.cli.live"):
        for step, row in enumerate(logs, 1):
            callback.on_log(None, _state(step, main_process), None, logs=row)
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
        ({"recommendation/top1_share": 0.34}, "--item_coef"),
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
        {"item/mean_pairwise_cosine": 0.95, "table/fresh_rank_gain": 0.0, "recommendation/top1_share": 0.1},
        {"grad_norm/item": 1.6, "grad_norm/token": 0.17},
        {"grad_norm/item": 1.6, "grad_norm/token": 0.0},
        {"grad_norm/item": 1.6},
        {"reward": 1.0, "frac_reward_zero_std": None, "rollout/missing_marker": math.nan},
    ],
)
def test_health_is_silent_at_the_thresholds_and_without_values(caplog, logs):
    assert _warnings(caplog, *[logs] * 5) == []


def test_health_forgives_one_noisy_batch(caplog):
    rows = [{"frac_reward_zero_std": value} for value in (0.9, 0.0, 0.3, 0.8, 0.3)]
    assert _warnings(caplog, *rows) == []


def test_a_high_cosine_may_fall_but_not_rise_or_stay(caplog):
    def rows(values):
        return [{"item/mean_pairwise_cosine": value} for value in values]

    assert _warnings(caplog, *rows([0.99, 0.98, 0.97, 0.96, 0.94, 0.9])) == []
    assert len(_warnings(caplog, *rows([0.3, 0.4, 0.45, 0.51]))) == 1
    assert _warnings(caplog, *rows([0.3, 0.4, 0.45, 0.49])) == []
    assert len(_warnings(caplog, *rows([0.99 - 0.001 * step for step in range(15)]))) == 1


def test_callbacks_work_in_a_real_trainer(tmp_path, tiny_model, shop, chat_tokenizer):
    """One process, three steps of plain language modelling: every hook is called with what transformers passes."""
    from transformers import Trainer

    args = TrainingArguments(
        tmp_path, max_steps=3, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows = [dict(chat_tokenizer(title), labels=chat_tokenizer(title).input_ids) for title in shop["items"]["title"]]
    rows = [{key: value[:2] for key, value in row.items()} for row in rows]
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    shown = RecPOProgressCallback(console=console)
    trainer = Trainer(
        tiny_model(), args, train_dataset=rows, callbacks=[shown, LearningCurveCallback(), HealthCallback()]
    )
    trainer.train()
    shown.show_rollout(EXAMPLE)
    assert "loss" in console.file.getvalue() and isinstance(trainer.control, TrainerControl)
    assert (tmp_path / "learning_curve.png").exists()
