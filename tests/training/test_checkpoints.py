"""Checkpoints: whole or not there, resumed to the same numbers, the best never deleted."""

import json
import logging
import shutil

import kill_resume
import pytest
import torch
from transformers import TrainerCallback

from r2ec_trl.errors import UserError
from r2ec_trl.training.checkpoints import MANIFEST, checkpoints, is_whole, latest_checkpoint, remove_old_checkpoints

STEPS = 7
RUN = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "table_refresh_budget": 0.1, "seed": 3}


class Users(TrainerCallback):
    """Whom each step trains on, and a stop as sudden as an exception after some step."""

    def __init__(self, stop_after=None):
        self.trainer, self.stop_after, self.users = None, stop_after, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.users[state.global_step] = self.trainer.last_rollout_example["user_id"]
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def train(make_trainer, shop, output_dir, stop_after=None, resume=None, **settings):
    """Six users, two a step: an epoch is three steps."""
    users = Users(stop_after)
    torch.manual_seed(0)  # the adapter's start
    trainer = make_trainer(
        train=shop["train"].select(range(6)), callbacks=[users], **{**RUN, "output_dir": str(output_dir), **settings}
    )
    users.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert stop_after is not None
    return trainer, users.users


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory):
    """`fake_run({10: True, 20: False})` makes checkpoint folders, whole or not."""
    from r2ec_trl.training.checkpoints import write_manifest

    def make(steps):
        folder = tmp_path_factory.mktemp("run")
        for step, whole in steps.items():
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir()
            (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": 0.0, "global_step": step}))
            if whole:
                write_manifest(checkpoint)
        return folder

    return make


@pytest.mark.parametrize("peft", [True, False])
def test_a_resumed_run_ends_where_the_unbroken_one_does(make_trainer, shop, tmp_path, peft):
    """Stopped at step 5, saved at 4, in the second epoch: same users, same rollouts, same weights and table."""
    whole, users = train(make_trainer, shop, tmp_path / "whole", peft=peft)
    _, before = train(make_trainer, shop, tmp_path / "cut", stop_after=5, peft=peft)
    resumed, after = train(make_trainer, shop, tmp_path / "cut", resume="latest", peft=peft)
    assert list(after) == [5, 6, 7]
    assert {**before, **after} == users
    assert len(set(users.values())) > 2
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed).items())
    assert torch.equal(resumed.table.rows, whole.table.rows)


def test_latest_skips_a_half_written_checkpoint_with_a_warning(fake_run, caplog):
    run = fake_run({5: True, 10: True, 15: False, 100: False})
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run) == run / "checkpoint-10"
    assert [record.getMessage() for record in caplog.records] == [
        f"{run / 'checkpoint-100'} is half-written: skipped.",
        f"{run / 'checkpoint-15'} is half-written: skipped.",
    ]
    (run / "checkpoint-10" / "trainer_state.json").write_text("{")  # cut short
    assert latest_checkpoint(run) == run / "checkpoint-5"
    (run / "checkpoint-5" / "trainer_state.json").unlink()
    assert latest_checkpoint(run) is None


def test_the_limit_deletes_neither_the_best_nor_the_newest_whole_one(fake_run):
    run = fake_run({5: True, 10: True, 15: True, 20: True, 25: False})
    remove_old_checkpoints(run, 2, best=str(run / "checkpoint-5"))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-20"]
    remove_old_checkpoints(run, 1, best=str(run / "checkpoint-5"))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-20"]
    remove_old_checkpoints(run, None, best=None)
    remove_old_checkpoints(run, 1, best=None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-20"]


def test_the_best_checkpoint_stays_while_training_and_is_loaded_at_the_end(make_trainer, shop, tmp_path, monkeypatch):
    figures = iter([0.1, 0.9, 0.2, 0.3, 0.4])

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_recommendation/ndcg@10": next(figures)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr("r2ec_trl.training.greedy_evaluation.GreedyEvaluation.evaluate", evaluate)
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 5}
    trainer, _ = train(
        make_trainer, shop, tmp_path / "run", save_total_limit=2, load_best_model_at_end=True, **evaluating
    )
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-5"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert trainer.args.save_total_limit == 2


def test_a_checkpoint_holds_what_resuming_needs(make_trainer, shop, tmp_path):
    train(make_trainer, shop, tmp_path / "run", max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    names = set(json.loads((folder / MANIFEST).read_text())["files"])
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "item_table.safetensors",
        "item_table.json",
    } <= names
    assert is_whole(folder)
    assert json.loads((folder / "item_table.json").read_text())["next_row"] > 0


def test_a_large_table_is_encoded_anew(make_trainer, shop, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("r2ec_trl.training.checkpoints.MAX_TABLE_BYTES", 100)
    train(make_trainer, shop, tmp_path / "run", stop_after=3)
    assert not (tmp_path / "run" / "checkpoint-2" / "item_table.json").exists()
    with caplog.at_level(logging.WARNING):
        trainer, users = train(make_trainer, shop, tmp_path / "run", resume="latest", max_steps=3)
    assert list(users) == [3] and not trainer.table.is_empty
    assert "encoded anew" in caplog.text


def test_a_checkpoint_without_its_optimizer_is_said(make_trainer, shop, tmp_path, caplog):
    train(make_trainer, shop, tmp_path / "run", stop_after=3, save_only_model=True)
    with caplog.at_level(logging.WARNING):
        _, users = train(make_trainer, shop, tmp_path / "run", resume="latest", max_steps=3)
    assert list(users) == [3] and "holds no optimizer" in caplog.text


def test_latest_without_any_checkpoint_starts_from_the_beginning(make_trainer, shop, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, users = train(make_trainer, shop, tmp_path / "run", resume="latest", max_steps=1)
    assert list(users) == [1]
    assert "starting from the beginning" in caplog.text


def test_a_wrong_or_cut_checkpoint_is_named(make_trainer, shop, tmp_path, fake_run):
    with pytest.raises(UserError, match="is no checkpoint"):
        train(make_trainer, shop, tmp_path / "run", resume=str(tmp_path / "nowhere"))
    run = fake_run({5: True})
    (run / "checkpoint-5" / "trainer_state.json").write_text("{")
    with pytest.raises(UserError, match="cut short"):
        train(make_trainer, shop, tmp_path / "run", resume=str(run / "checkpoint-5"))


def test_a_half_written_folder_of_the_same_step_is_replaced(make_trainer, shop, tmp_path):
    leftover = tmp_path / "run" / "checkpoint-2"
    leftover.mkdir(parents=True)
    (leftover / "rng_state_7.pth").write_text("of a run on more processes")
    train(make_trainer, shop, tmp_path / "run", max_steps=2)
    assert is_whole(leftover) and not (leftover / "rng_state_7.pth").exists()
    shutil.rmtree(leftover)


@pytest.mark.slow
def test_kill_nine_three_times(tiny_model_folder, shop_folder, tmp_path):
    """tests/kill_resume.py: each resume ends, with the metrics of an unbroken run."""
    words = ["--work", tmp_path, "--model", tiny_model_folder("llama"), "--dataset", shop_folder, "--kills", 3]
    result = kill_resume.main([str(word) for word in words])
    assert result["kills"] == 3 and result["while_saving"] >= 1
