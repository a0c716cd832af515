"""Callbacks are fed the logs a trainer would give them."""

import io
import itertools
import math
import re
from types import SimpleNamespace

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from r2ec_trl import progress
from r2ec_trl.cli import terminal
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


def _show(terminal, main_process=True, args=None, example=EXAMPLE, shown=1):
    """A short run with one evaluation; returns all that was written."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    callback = RecPOProgressCallback(lambda: dict(example, rank=next(ranks)), console=console, shown=shown)
    ranks = itertools.count(3)
    callback.on_train_begin(args, _state(main_process=main_process), None)
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
    assert "  target, rank 4: guitar strings" in lines


def test_progress_on_a_terminal_shows_figures_time_split_and_rollout():
    last = _show(terminal=True).split("RecPO")[-1]
    for text in ("3/20", "reward", "0.5000", "ndcg_reward", "best validation NDCG@10", "0.3100", "75%", "violin case"):
        assert text in last, text
    assert "strings [bold]soon" in last  # the policy's text is no markup


def test_as_many_rollouts_as_asked_for_are_shown():
    """Three logs bring the ranks 3, 4 and 5; the newest stay, and none on wish."""

    def ranks(shown, terminal):
        text = _show(terminal, shown=shown).split("\x1b[?25h")[0]
        text = text.split("RecPO")[-1] if terminal else text.split("0.3000")[-1]
        return [int(rank) for rank in re.findall(r"target, rank (\d)", text)]

    for moving in (False, True):
        assert [ranks(shown, moving) for shown in (0, 1, 2)] == [[], [5], [4, 5]]


def test_the_mask_that_selects_is_the_one_that_is_shown():
    """`--selection_mask`: the masked figure and its best, not the other; without it the unmasked alone."""
    args = SimpleNamespace(selection_metric="recommendation/masked_ndcg@10")
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    for settings, words in ((args, "validation NDCG@10, history masked 0.2200"), (None, "validation NDCG@10 0.3100")):
        lines = Console(file=io.StringIO(), width=120)
        for target in (lines, console):
            callback = RecPOProgressCallback(console=target)
            callback.on_train_begin(settings, _state(), None)
            for masked in (0.22, 0.11):
                logs = {"eval_recommendation/masked_ndcg@10": masked, "eval_recommendation/ndcg@10": masked + 0.09}
                callback.on_log(None, _state(1), None, logs=logs)
            callback.close()
        assert lines.file.getvalue().splitlines()[0] == f"step 1/20 | {words}"
        assert callback.best_ndcg == float(words[-6:])


def test_what_data_and_policy_write_cannot_steer_the_terminal():
    hostile = "\x1b[2J\x9b2K\x07\u202e\r"
    example = {**EXAMPLE, "user_id": hostile, "reasoning": hostile, "target_title": hostile, "top_titles": [hostile]}
    example["history_titles"] = [hostile, "[bold red]x[/]"]
    text = _show(terminal=False, example=example)
    assert not set("\x1b\x9b\x07\u202e\r") & set(text) and "\\x1b[2J\\x9b2K\\x07\\u202e" in text
    text = _show(terminal=True, example=example)
    assert not set("\x9b\x07\u202e") & set(text) and "\x1b[2J" not in text and "[bold red]x[/]" in text


def test_long_work_is_a_line_of_the_bar_while_it_lasts(monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    callback = RecPOProgressCallback(console=console)
    callback.on_train_begin(None, _state(), None)
    progress.report("reasoning", 40, 200)
    assert [task.description for task in callback._bar.tasks] == ["step", "reasoning"]
    progress.report("reasoning", 200, 200)
    assert [task.description for task in callback._bar.tasks] == ["step"]
    callback.close()
    progress.report("reasoning", 40, 200)  # nobody watches any more


def test_progress_of_other_processes_is_silent():
    assert _show(terminal=True, main_process=False) == "" == _show(terminal=False, main_process=False)


def test_progress_gives_the_terminal_back_when_training_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    callback = RecPOProgressCallback(console=console)
    callback.on_train_begin(None, _state(), None)
    callback.close()  # what atexit calls
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # cursor shown


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
