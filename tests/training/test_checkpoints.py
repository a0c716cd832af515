"""Checkpoints: whole or not there, resumed to the same numbers, the best never deleted."""

import json
import logging
import random
import shutil
import signal
from types import SimpleNamespace

import kill_resume
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from r2ec_trl.cli.run_start import TimeLimitCallback
from r2ec_trl.errors import UserError
from r2ec_trl.training.checkpoints import (
    MANIFEST,
    CheckpointKeeper,
    checkpoints,
    is_whole,
    latest_checkpoint,
    read_state,
    remove_old_checkpoints,
    write_manifest,
)

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


def test_a_run_that_goes_on_within_a_generation_batch_sees_the_same_users(make_trainer, shop, tmp_path, caplog):
    """Saved at step 3, the first of the two on its rollouts: the fourth has them drawn anew, the fifth new users."""
    twice = {"num_iterations": 2, "save_steps": 3, "max_steps": 6}
    _, users = train(make_trainer, shop, tmp_path / "whole", **twice)
    _, before = train(make_trainer, shop, tmp_path / "cut", stop_after=4, **twice)
    with caplog.at_level(logging.WARNING):
        _, after = train(make_trainer, shop, tmp_path / "cut", resume="latest", **twice)
    assert list(after) == [4, 5, 6] and {**before, **after} == users and users[5] != users[4]
    assert "Step 3 lies within a generation batch" in caplog.text


def test_a_run_that_goes_on_with_other_batches_is_in_step_with_transformers(make_trainer, shop, tmp_path, caplog):
    """
    Saved after three steps of two users, an epoch. Three users a batch, each used three times, make six steps of it:
    transformers passes over three micro-batches, and the run goes on with the second batch, from its start.
    """
    train(make_trainer, shop, tmp_path, max_steps=3, save_steps=3)
    other = {"per_device_train_batch_size": 12, "num_iterations": 3, "max_steps": 5, "save_steps": 9}
    with caplog.at_level(logging.WARNING):
        resumed, after = train(make_trainer, shop, tmp_path, resume="latest", **other)
    assert "Step 3 was epoch 1.00 of the run and counts as epoch 0.50 now" in caplog.text
    assert list(after) == [4, 5] and after[4] == after[5] and resumed._step == 5


class Interrupt(TrainerCallback):
    """Ctrl-C between the micro-batches of the second step, once."""

    done = False

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_in_the_same_process(make_trainer, shop, tmp_path):
    """
    The trainer itself goes on, as in a notebook: the rollouts in its buffer were of the step that is taken anew, and
    in between SIGTERM ends the process again.
    """
    before, ends = signal.getsignal(signal.SIGTERM), []
    settings = {**RUN, "gradient_accumulation_steps": 2, "max_steps": 3, "save_steps": 1}
    for folder, callbacks in (("whole", []), ("cut", [Interrupt()])):
        torch.manual_seed(0)
        settings["output_dir"] = str(tmp_path / folder)
        trainer = make_trainer(train=shop["train"].select(range(12)), callbacks=callbacks, **settings)
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert signal.getsignal(signal.SIGTERM) is before
        trainer.train(resume_from_checkpoint="latest" if callbacks else None)
        ends.append((weights_of(trainer), trainer.batch.prompts, trainer.state.global_step))
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(value, ends[0][0][name]) for name, value in ends[1][0].items())


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


def test_the_limit_deletes_half_written_ones_first_and_none_keeps_all(fake_run):
    run = fake_run({5: True, 10: True, 15: True, 20: False})
    for limit in (None, 0, -1):  # as transformers has it
        remove_old_checkpoints(run, limit, best=None)
        assert len(checkpoints(run)) == 4
    remove_old_checkpoints(run, 3, best=None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]


def test_what_was_written_last_is_the_newest_after_others_are_gone(fake_run):
    run = fake_run({5: True, 10: True, 15: True})
    remove_old_checkpoints(run, 2, best=None)
    (run / "checkpoint-8").mkdir()  # the run went back to before 8
    write_manifest(run / "checkpoint-8")
    assert latest_checkpoint(run) == run / "checkpoint-8"


def test_folders_of_other_names_are_no_checkpoints(fake_run):
    run = fake_run({5: True})
    for name in ("checkpoint-7.bak", "checkpoint-9-old", "my-checkpoint-8", "checkpoint-"):
        (run / name).mkdir()
    (run / "checkpoint-6").touch()
    assert checkpoints(run) == [run / "checkpoint-5"]


def test_a_file_that_grew_is_not_whole(fake_run):
    folder = fake_run({5: True}) / "checkpoint-5"
    with open(folder / "trainer_state.json", "a", encoding="utf-8") as file:
        file.write(" ")
    assert not is_whole(folder)


def keeper_of(**settings):
    """A keeper without a trainer; its table is not saved."""
    defaults = {"should_save": True, "save_total_limit": None, "ignore_data_skip": False}
    args = SimpleNamespace(**{**defaults, **settings})
    table, accelerator = SimpleNamespace(num_bytes=0), SimpleNamespace(wait_for_everyone=lambda: None)
    return CheckpointKeeper(table, accelerator, args, SimpleNamespace(callbacks=[]))


def test_nothing_is_deleted_before_the_new_one_is_whole(fake_run):
    """One may stay: while the third is written, and when that fails, the two of before are there."""
    run, taker = fake_run({1: True, 2: True}), keeper_of(save_total_limit=1)
    state, folder = TrainerState(), run / "checkpoint-3"
    with pytest.raises(UserError, match="checkpoint-3 could not be written .*No space left.*checkpoint-2 is whole"):
        with taker.saving(folder, state):
            assert taker.args.save_total_limit is None  # else transformers would delete by itself
            folder.mkdir()
            raise OSError("No space left on device")
    assert [path.name for path in checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(RuntimeError, match="shapes"), taker.saving(folder, state):
        raise RuntimeError("mat1 and mat2 shapes")  # no fault of the disk
    with taker.saving(folder, state):
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        assert len(checkpoints(run)) == 3
    assert checkpoints(run) == [folder] and is_whole(folder) and (folder / "model.safetensors").is_file()
    assert taker.args.save_total_limit == 1


def test_a_process_that_does_not_save_touches_no_file(fake_run):
    run = fake_run({1: True, 2: False})
    with keeper_of(should_save=False, save_total_limit=1).saving(run / "checkpoint-2", TrainerState()):
        assert (run / "checkpoint-2" / "trainer_state.json").is_file()
    assert len(checkpoints(run)) == 2 and not is_whole(run / "checkpoint-2")


@pytest.mark.parametrize(
    ("step", "skip", "expected"), [(0, True, (0, 0)), (1, True, (0, 4)), (3, True, (1, 4)), (3, False, (1, 0))]
)
def test_a_resumed_run_counts_the_short_window_at_an_epochs_end(step, skip, expected):
    """Six micro-batches an epoch, four a step: transformers makes two steps of it, the second of two."""
    taker = keeper_of(gradient_accumulation_steps=4, ignore_data_skip=not skip)
    taker.resumed = TrainerState(global_step=step)
    assert taker.position(6) == expected


@pytest.mark.parametrize(
    ("greater", "found", "best", "saves"),
    [(True, 0.5, None, 1), (True, 0.6, 0.5, 1), (True, 0.5, 0.5, 0), (False, 0.4, 0.5, 1), (False, 0.6, 0.5, 0)],
)
def test_a_new_best_is_saved_at_once_where_it_will_be_loaded(greater, found, best, saves):
    for loads in (True, False):
        args = SimpleNamespace(load_best_model_at_end=loads, metric_for_best_model="loss", greater_is_better=greater)
        control = TrainerControl()
        keeper_of().on_evaluate(args, TrainerState(best_metric=best), control, {"eval_loss": found})
        assert control.should_save == (loads and bool(saves))


def test_a_run_that_went_back_goes_on_from_what_it_wrote_last(fake_run, tmp_path):
    """Resumed from 200 and saved at 212: the 300 of before is the older one, in a copy too, and the new one stays."""
    run = shutil.copytree(fake_run({200: True, 300: True, 212: True}), tmp_path / "copy")
    assert latest_checkpoint(run) == run / "checkpoint-212"
    remove_old_checkpoints(run, 2, best=str(run / "checkpoint-200"))
    assert [path.name for path in checkpoints(run)] == ["checkpoint-200", "checkpoint-212"]


def replay_figures(monkeypatch, figures):
    """Each evaluation finds the next of them."""
    figures = iter(figures)

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_recommendation/ndcg@10": next(figures)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr("r2ec_trl.training.greedy_evaluation.GreedyEvaluation.evaluate", evaluate)


@pytest.mark.parametrize("save_steps", [1, 5])  # at each evaluation; at the last one, and at a new best
def test_the_best_checkpoint_stays_while_training_and_is_loaded_at_the_end(
    make_trainer, shop, tmp_path, monkeypatch, save_steps
):
    replay_figures(monkeypatch, [0.1, 0.9, 0.2, 0.3, 0.4])
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": save_steps, "max_steps": 5}
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


@pytest.mark.parametrize("steps", [2, 3])  # within an epoch, and at its end
def test_a_finished_run_is_not_trained_any_further(make_trainer, shop, tmp_path, caplog, steps):
    first, _ = train(make_trainer, shop, tmp_path / "run", max_steps=steps)
    with caplog.at_level(logging.WARNING):
        again, users = train(make_trainer, shop, tmp_path / "run", resume="latest", max_steps=steps)
    assert users == {} and again.state.global_step == again.state.max_steps == steps
    assert again.args.max_steps == steps and f"ended at step {steps}: nothing is left to train" in caplog.text
    expected = weights_of(first)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())
    more, users = train(make_trainer, shop, tmp_path / "run", resume="latest", max_steps=steps + 1)
    assert list(users) == [steps + 1]


def test_a_run_that_was_stopped_early_is_finished_and_its_best_weights_are_loaded(make_trainer, shop, tmp_path):
    class Early(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    settings = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_eval_users": 2,
        "load_best_model_at_end": True,
    }
    ends = []
    for resume in (None, "latest"):
        torch.manual_seed(0)
        args = {**RUN, "output_dir": str(tmp_path / "run"), **settings}
        trainer = make_trainer(train=shop["train"].select(range(6)), callbacks=[Early()], **args)
        trainer.train(resume_from_checkpoint=resume)
        ends.append((trainer.state.global_step, trainer.state.best_model_checkpoint, weights_of(trainer)))
    assert ends[0][:2] == ends[1][:2] and ends[0][0] == 3
    assert all(torch.equal(value, ends[0][2][name]) for name, value in ends[1][2].items())
    latest = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert latest["state"]  # there was something to go on with


@pytest.mark.parametrize(("before", "end"), [([3], 4), ([], 5)], ids=["as before", "new"])
def test_patience_is_not_forgotten_when_a_run_goes_on(make_trainer, shop, tmp_path, monkeypatch, before, end):
    """Nothing gets better: patience 3 is used up by evaluations 2 to 4, or 3 to 5 where it came with the resume."""
    replay_figures(monkeypatch, [0.5] * 9)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    for steps, resume, patience in ((2, None, before), (9, "latest", [3])):
        args = {**RUN, **settings, "max_steps": steps, "output_dir": str(tmp_path / "run")}
        callbacks = [EarlyStoppingCallback(count) for count in patience]
        trainer = make_trainer(train=shop["train"].select(range(6)), callbacks=callbacks, **args)
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == end


# --------------------------------------------------------------------------------------------------------- damage
@pytest.fixture(scope="module")
def saved(shop, tiny_model, chat_tokenizer, tmp_path_factory):
    """A run of one step with its checkpoint: read only."""
    from conftest import QUICK

    from r2ec_trl.training.recpo_config import RecPOConfig
    from r2ec_trl.training.recpo_trainer import RecPOTrainer

    folder = tmp_path_factory.mktemp("saved") / "run"
    args = RecPOConfig(str(folder), **{**QUICK, "max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    RecPOTrainer(tiny_model("llama"), shop["items"], None, args, shop["train"], None, chat_tokenizer).train()
    return folder / "checkpoint-1"


@pytest.fixture
def keeper(make_trainer, saved, tmp_path):
    """`keeper(change)` copies the checkpoint, changes the copy, and returns what takes it up, and the folder."""
    trainer = make_trainer(peft=False, max_steps=1)

    def take(change):
        copy = shutil.copytree(saved, tmp_path / f"copy{len(list(tmp_path.iterdir()))}" / saved.name)
        change(copy)
        trainer.keeper.args.output_dir = str(copy.parent)
        return trainer.keeper, copy

    return take


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_one_flipped_bit_of_the_weights_is_noticed(keeper, caplog):
    weights, copy = keeper(lambda folder: flip(folder / "model.safetensors", 8 * 50_000 + 3))
    assert is_whole(copy) and not is_whole(copy, content=True)
    with pytest.raises(UserError, match="files of .* are damaged; give another checkpoint"):
        weights.resume_from(str(copy))
    with caplog.at_level(logging.WARNING):
        assert weights.resume_from("latest") is None
    assert "is damaged: skipped" in caplog.text


@pytest.mark.slow
def test_a_hundred_flipped_bits_are_noticed_or_do_no_harm(saved, keeper, make_trainer):
    """Every file is hit, the manifest too: the checkpoint is refused, or what is read is what was written."""
    draw, harmless = random.Random(0), 0
    files = sorted(path.name for path in saved.iterdir())
    expected = read_state(saved)
    for number in range(100):
        name = files[number % len(files)]

        def change(folder, name=name):
            flip(folder / name, draw.randrange(8 * (folder / name).stat().st_size))

        taker, copy = keeper(change)
        try:
            taker.resume_from(str(copy))
        except UserError:
            shutil.rmtree(copy.parent)
            continue
        assert name == MANIFEST, name
        assert read_state(copy) == expected and all(
            (copy / each).read_bytes() == (saved / each).read_bytes() for each in files if each != MANIFEST
        )
        harmless += 1
        shutil.rmtree(copy.parent)
    assert harmless < 10


def write_state(**values):
    def change(folder):
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        write_manifest(folder)

    return change


@pytest.mark.parametrize(
    "values",
    [
        {"global_step": "1"},
        {"global_step": None},
        {"global_step": -1},
        {"global_step": True},
        {"epoch": float("nan")},
        {"max_steps": [4]},
        {"log_history": {"a": 1}},
        {"log_history": ["a"]},
        {"best_model_checkpoint": 3},
        {"stateful_callbacks": []},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_state_of_other_types_is_one_sentence_that_names_the_field(keeper, values):
    taker, copy = keeper(write_state(**values))
    with pytest.raises(UserError, match=f"trainer_state.json: `{next(iter(values))}` is not what transformers"):
        taker.resume_from(str(copy))


@pytest.mark.parametrize("text", ["[1]", "3", "[" * 100_000, "\xff", "{"])
def test_a_state_that_is_no_object_is_one_sentence(keeper, text):
    def change(folder):
        (folder / "trainer_state.json").write_text(text, encoding="latin-1")
        write_manifest(folder)

    taker, copy = keeper(change)
    with pytest.raises(UserError, match="trainer_state.json"):
        taker.resume_from(str(copy))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused(keeper, name):
    taker, copy = keeper(lambda folder: (folder / name).write_bytes(b"x"))
    with pytest.raises(UserError, match="holds pickled weights"):
        taker.resume_from(str(copy))


def resumed_best(keeper, caplog, **best):
    """What a run knows of its best checkpoint when it goes on, and what it says."""
    taker, copy = keeper(write_state(**best))
    with caplog.at_level(logging.WARNING):
        taker.resume_from(str(copy))
    state = TrainerState(**best)
    taker.on_train_begin(None, state, TrainerControl())
    return (state.best_model_checkpoint, state.best_metric, state.best_global_step), copy, caplog.text


@pytest.mark.parametrize("name", ["checkpoint-9", "..", "elsewhere"])
def test_a_best_checkpoint_outside_of_the_run_stays_outside(keeper, caplog, tmp_path, name):
    """A run that goes on in another folder is not refused; weights of elsewhere are not read."""
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "elsewhere").mkdir()
    best = {"best_model_checkpoint": f"{tmp_path}/{name}", "best_metric": 0.5, "best_global_step": 9}
    found, _, said = resumed_best(keeper, caplog, **best)
    assert found == (None, None, None) and "the best is looked for anew" in said


def test_a_run_that_was_moved_keeps_its_best_checkpoint(keeper, caplog):
    best = {"best_model_checkpoint": "/of/before/checkpoint-1", "best_metric": 0.5, "best_global_step": 1}
    found, copy, said = resumed_best(keeper, caplog, **best)
    assert found == (str(copy), 0.5, 1) and "looked for anew" not in said


@pytest.mark.parametrize("limit", [EarlyStoppingCallback, TimeLimitCallback])
def test_a_run_that_a_limit_ended_is_finished_under_the_same_limit_alone(keeper, limit):
    control = {"args": {"should_training_stop": True}, "attributes": {}}
    callbacks = {"TrainerControl": control, limit.__name__: limit(2).state()}
    taker, copy = keeper(write_state(max_steps=5, stateful_callbacks=callbacks))
    taker.resume_from(str(copy))
    finished = []
    for limits in ([limit(2)], [limit(3)], []):
        taker.handler = SimpleNamespace(callbacks=limits)
        finished.append(taker.is_finished(5))
    assert finished == [True, False, False]
    taker.handler = SimpleNamespace(callbacks=[limit(2)])
    assert not taker.is_finished(6)  # more steps were asked for
    assert taker.resume_from(None) is None and not taker.is_finished(5)  # a run of its own


def test_a_table_that_cannot_be_read_back_is_emptied(keeper):
    """The evaluation of the start filled it with rows of other weights."""

    def change(folder):
        (folder / "item_table.json").unlink()
        write_manifest(folder)

    taker, copy = keeper(change)
    taker.table.refresh(lambda sequences: torch.ones(len(sequences), 4))
    taker.resume_from(str(copy))
    assert taker.table.is_empty


def test_a_manifest_of_sizes_alone_still_counts(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "checkpoint-1")
    files = {path.name: path.stat().st_size for path in copy.iterdir() if path.name != MANIFEST}
    (copy / MANIFEST).write_text(json.dumps({"files": files}))
    assert is_whole(copy, content=True)


@pytest.mark.slow
def test_kill_nine_three_times(tiny_model_folder, shop_folder, tmp_path):
    """tests/kill_resume.py: each resume ends, with the metrics of an unbroken run."""
    words = ["--work", tmp_path, "--model", tiny_model_folder("llama"), "--dataset", shop_folder, "--kills", 3]
    result = kill_resume.main([str(word) for word in words])
    assert result["kills"] == 3 and result["while_saving"] >= 1
