"""The learning curve is written whole, and shows what was logged."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from transformers import TrainerState

from r2ec_trl.cli.learning_curve import LearningCurveCallback
from r2ec_trl.errors import UserError


def _state(step=0, main_process=True, history=()):
    state = TrainerState(global_step=step, max_steps=20, log_history=list(history))
    state.is_world_process_zero = main_process
    return state


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
    history[1] |= {"eval_recommendation/ndcg@10_low": 0.8, "eval_recommendation/ndcg@10_high": 1.1}
    ndcg, reward, *_ = LearningCurveCallback().draw(history).axes
    assert ndcg.lines[0].get_xydata().tolist() == [[5, 0.5], [10, 1.0]]
    assert {0.8, 1.1} <= set(ndcg.collections[0].get_paths()[0].vertices[:, 1]) and not reward.collections
    assert ndcg.lines[0].get_marker() == "o"
    assert not reward.lines and reward.texts[0].get_text() == "not logged"


def test_the_curve_follows_the_figure_that_selects(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(LearningCurveCallback, "draw", lambda self, history, *figure: drawn.append(figure) or Figure())
    for metric in ("recommendation/masked_ndcg@10", "recommendation/ndcg@10"):
        args = SimpleNamespace(output_dir=str(tmp_path), selection_metric=metric)
        LearningCurveCallback().on_evaluate(args, _state(1, history=[{"step": 1}]), None)
    assert drawn == [
        ("eval_recommendation/masked_ndcg@10", "validation NDCG@10, history masked"),
        ("eval_recommendation/ndcg@10", "validation NDCG@10"),
    ]
    monkeypatch.undo()
    history = [{"step": 5, "eval_recommendation/masked_ndcg@10": 0.2, "eval_recommendation/ndcg@10": 0.4}]
    axes, *_ = LearningCurveCallback().draw(history, *drawn[0]).axes
    assert axes.get_title() == drawn[0][1] and axes.lines[0].get_xydata().tolist() == [[5, 0.2]]


def test_learning_curve_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback = LearningCurveCallback()
    callback.on_evaluate(args, _state(1, history=[{"step": 1, "reward": 0.1}]), None)
    before = (tmp_path / "log_history.json").read_text()

    def full_disk(path, *args, **kwargs):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space left"):
        callback.on_evaluate(args, _state(2, history=[{"step": 1}, {"step": 2}]), None)
    assert (tmp_path / "log_history.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_curve.png", "log_history.json"]


def test_only_the_main_process_writes_and_nothing_before_the_first_log(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path))
    LearningCurveCallback().on_train_end(args, _state(1, main_process=False, history=[{"step": 1}]), None)
    LearningCurveCallback().on_train_end(args, _state(), None)
    assert list(tmp_path.iterdir()) == []
