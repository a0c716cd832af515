"""What goes wrong ends the run on every process, soon, with a sentence that names the cause and the knob."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_distributed import ROOT, SETTINGS, launch_words
from transformers import Trainer, TrainerControl, TrainerState
from trl import GRPOTrainer

from r2ec_trl.errors import UserError
from r2ec_trl.training.checkpoints import checkpoints, is_whole
from r2ec_trl.training.faults import MEMORY_KNOBS, RunGuard, SaveOnTerminate
from r2ec_trl.training.telemetry import PARTS

WORKER = Path(__file__).parents[1] / "fault_worker.py"
STARTUP = 600.0  # seconds from the launch to the fault: imports, on a busy machine
PATIENCE = 60.0  # seconds from the fault to the end of every process


@pytest.fixture
def start(tiny_model_folder, shop_folder, tmp_path):
    """`start(fault, processes, **settings)` launches the worker; its output goes to the returned log file."""

    def start_worker(fault, processes, resume=None, **settings):
        case = {
            "trainer": "recpo",
            "model": str(tiny_model_folder("llama")),
            "dataset": str(shop_folder),
            "adapter": None,
            "train_rows": list(range(40)),
            "fault": fault,
            "resume": resume,
            "settings": {
                **SETTINGS,
                "output_dir": str(tmp_path / "run"),
                "per_device_train_batch_size": 8 // processes,
                "num_generations": 4,
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 2,
                **settings,
            },
        }
        (tmp_path / "case.json").write_text(json.dumps(case))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        log = tmp_path / "log.txt"
        with open(log, "w", encoding="utf-8") as file:
            words = [*launch_words("plain", processes), str(WORKER), str(tmp_path / "case.json")]
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)
        return process, log

    return start_worker


def wait_for(condition, process, log, seconds=STARTUP):
    """Until `condition()`; a process that ends before, or takes too long, is a failure."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"ended or too late (status {process.poll()}):\n{log.read_text()[-4000:]}")
        time.sleep(0.1)


def end_of(process, log, patience=PATIENCE):
    """Status and output of a process that must end in time."""
    try:
        status = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {patience:.0f} s:\n{log.read_text()[-4000:]}")
    return status, log.read_text()


def end_after_fault(process, log):
    """Status and output of a worker that must end soon after it went wrong."""
    wait_for(lambda: "going wrong" in log.read_text(), process, log)
    return end_of(process, log)


# ---------------------------------------------------------------------------------------------- several processes
@pytest.mark.distributed
def test_out_of_memory_on_one_rank_stops_all_and_names_the_knob(start, tmp_path):
    status, output = end_after_fault(*start("memory", 2))
    assert status != 0
    assert "Out of memory in 'train' (process 1, step 2); lower `--per_device_train_batch_size`" in output
    assert "finished" not in output
    assert is_whole(tmp_path / "run" / "checkpoint-2")


@pytest.mark.distributed
def test_a_hanging_rank_is_named_when_the_time_is_up(start):
    status, output = end_after_fault(*start("hang", 2, ddp_timeout=20))
    assert status != 0
    assert "process 1 is still at 'train' of step 2" in output


@pytest.mark.distributed
def test_a_loss_that_is_no_number_on_one_rank_stops_all(start, tmp_path):
    status, output = end_after_fault(*start("loss", 2))
    assert status != 0
    assert "The loss is nan at step 2; its rows are in" in output
    rows = json.loads((tmp_path / "run" / "faults" / "step2-process1.json").read_text())
    assert len(rows) == 4 and all("Bought" in row["prompt_ids"] for row in rows)


@pytest.mark.distributed
def test_sigterm_to_the_launcher_saves_and_leaves_and_the_run_goes_on_later(start, tmp_path):
    """The signal comes in the third step: it is finished and saved, though no save was due."""
    process, log = start("wait", 2, save_steps=100)
    marks = [tmp_path / "run" / f"waiting{rank}" for rank in (0, 1)]
    wait_for(lambda: all(mark.exists() for mark in marks), process, log)
    process.send_signal(signal.SIGTERM)
    status, output = end_of(process, log)
    assert status != 0 and "SIGTERM: saving step 3" in output
    assert [path.name for path in checkpoints(tmp_path / "run") if is_whole(path)] == ["checkpoint-3"]
    status, output = end_of(*start("none", 2, resume="latest"), STARTUP)
    assert status == 0 and "finished at step 4" in output


@pytest.mark.slow
def test_sigterm_on_one_process_exits_with_its_status(start, tmp_path):
    process, log = start("wait", 1, save_steps=100)
    wait_for((tmp_path / "run" / "waiting0").exists, process, log)
    process.send_signal(signal.SIGTERM)
    status, output = end_of(process, log)
    assert status == 143, output[-2000:]
    assert is_whole(tmp_path / "run" / "checkpoint-3")


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_whole(start, tmp_path):
    """Files cannot grow beyond 20 kB from the third step on, so the writing of checkpoint 4 really fails."""
    status, output = end_after_fault(*start("disk", 1))
    assert status == 2
    assert "could not be written" in output and "checkpoint-2 is whole" in output
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert is_whole(tmp_path / "run" / "checkpoint-2")
    status, output = end_of(*start("none", 1, resume="latest"), STARTUP)
    assert status == 0 and "finished at step 4" in output


# ---------------------------------------------------------------------------------------------------- one process
def test_a_reward_that_is_no_number_stops_the_run_and_saves_the_rollouts(make_trainer, tmp_path):
    def broken_reward(completions, **kwargs):
        return [0.5, float("nan"), *[0.0] * (len(completions) - 2)]

    with pytest.raises(UserError, match=r"'broken_reward' returned nan for rollout 1.*The rollouts are in"):
        make_trainer(reward=broken_reward).train()
    rows = json.loads((tmp_path / "run" / "faults" / "step0-process0.json").read_text())
    assert len(rows) == 8
    assert {"user_id", "prompt", "completion", "target", "target_rank"} <= set(rows[1])


def test_a_loss_that_is_no_number_stops_the_run_and_saves_the_rows(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *args: loss(*args) * torch.nan)
    with pytest.raises(UserError, match=r"The loss is nan at step 0; its rows are in"):
        trainer.train()
    rows = json.loads((tmp_path / "run" / "faults" / "step0-process0.json").read_text())
    assert len(rows) == 8
    assert "Bought" in rows[0]["prompt_ids"] and "advantages" in rows[0]


def test_a_gradient_that_is_no_number_never_reaches_the_weights(make_trainer, monkeypatch):
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    norm = Trainer._get_grad_norm

    def break_gradient(self, *args, **kwargs):
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(torch.inf)
        return norm(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_get_grad_norm", break_gradient)
    with pytest.raises(UserError, match="gradient's norm is (inf|nan) at step 0, and the step was not taken"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_norm_of_mixed_precision_or_of_nobody_is_left_alone(tmp_path):
    """fp16 overflows until its scale fits, and the scaler skips that step; DeepSpeed may tell no norm at all."""
    telemetry = SimpleNamespace(step=lambda: 3, accelerator=SimpleNamespace(process_index=0))
    for fp16 in (True, False):
        guard = RunGuard(telemetry, SimpleNamespace(fp16=fp16, output_dir=str(tmp_path)), None)
        assert guard.check_norm(None) is None and guard.check_norm(2.0) == 2.0
        if fp16:
            assert guard.check_norm(math.inf) == math.inf
        else:
            with pytest.raises(UserError, match="norm is inf at step 3, and the step was not taken"):
                guard.check_norm(torch.tensor(math.inf))


@pytest.mark.parametrize("signals", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_sigterm_on_any_process_saves_on_all_and_evaluates_on_none(signals):
    """The scheduler waits for some seconds only; this process and another one, or neither, got the signal."""
    ended = []
    accelerator = SimpleNamespace(
        device="cpu",
        gather=lambda own: torch.cat([own, torch.tensor(signals[1:])]),
        end_training=lambda: ended.append(1),
    )
    saver, state = SaveOnTerminate(accelerator), TrainerState(global_step=3)
    control = TrainerControl(should_evaluate=True)
    saver.received = bool(signals[0])
    saver.on_step_end(None, state, control)
    assert (control.should_save, control.should_evaluate) == ((True, False) if any(signals) else (False, True))
    if any(signals):
        with pytest.raises(SystemExit) as left:
            saver.on_save(None, state, control)
        assert left.value.code == 143 and ended == [1]
    else:
        saver.on_save(None, state, control)  # one that was due anyway
        assert not ended


def test_sigterm_does_what_it_did_before_when_a_run_has_failed(make_trainer):
    before = signal.getsignal(signal.SIGTERM)

    def reward(completions, **kwargs):
        assert signal.getsignal(signal.SIGTERM) is not before
        raise KeyError

    with pytest.raises(KeyError):
        make_trainer(reward=reward).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_phase_has_a_knob():
    assert set(MEMORY_KNOBS) == {*PARTS, "train", "evaluate"}


@pytest.mark.parametrize("phase", ["generate", "score", "items", "train", "evaluate"])
def test_out_of_memory_names_the_knob_of_its_phase(make_trainer, monkeypatch, phase):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    place = {
        "generate": "trl.GRPOTrainer._generate_single_turn",
        "score": "r2ec_trl.items.table.ItemTable.rank",
        "items": "r2ec_trl.training.reward_pass.RewardPass.refresh",
        "train": "r2ec_trl.training.item_term.ItemTerm.loss",
        "evaluate": "r2ec_trl.training.greedy_evaluation.evaluate_users",
    }[phase]
    monkeypatch.setattr(place, fail)
    step = 1 if phase == "evaluate" else 0
    with pytest.raises(UserError) as caught:
        make_trainer(watch_steps=0, eval_strategy="steps", eval_steps=1).train()
    assert str(caught.value) == f"Out of memory in '{phase}' (process 0, step {step}); {MEMORY_KNOBS[phase]}."


def test_other_errors_keep_their_kind(make_trainer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("r2ec_trl.training.item_term.ItemTerm.loss", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        make_trainer(watch_steps=0).train()
