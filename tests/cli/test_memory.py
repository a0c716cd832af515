"""Steps of a run, counted as the trainer counts them; bytes by hand."""

from dataclasses import replace

import pytest

from r2ec_trl.cli.memory import ModelShape, Precision, Workload, memory_plan, optimizer_steps
from r2ec_trl.training.recpo_config import RecPOConfig


def test_steps_by_hand(tmp_path):
    """
    8 rows x 2 micro-batches are 16 rollouts, 4 users of G = 4, an optimizer step: 42 users give 10 batches and leave 2
    out; three epochs are 30 steps, 60 with two passes over each batch.
    """
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "use_cpu": True,
    }
    args = RecPOConfig(str(tmp_path), report_to="none", num_train_epochs=3, **settings)
    steps = optimizer_steps(42, args)
    assert (steps["users_a_batch"], steps["batches_an_epoch"], steps["users_left_out"], steps["steps"]) == (
        4,
        10,
        2,
        30,
    )
    twice = RecPOConfig(str(tmp_path), report_to="none", num_train_epochs=3, num_iterations=2, **settings)
    assert optimizer_steps(42, twice)["steps"] == 60
    assert optimizer_steps(42, RecPOConfig(str(tmp_path), report_to="none", max_steps=7, **settings))["steps"] == 7


def test_a_last_step_may_have_fewer_micro_batches(tmp_path):
    """3 batches of 2 micro-batches are 6, in steps of 4: 2 an epoch; .75 of 2 epochs are 1.5 and so 2 steps."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    args = RecPOConfig(
        str(tmp_path), report_to="none", use_cpu=True, num_generations=4, num_train_epochs=0.75, **settings
    )
    steps = optimizer_steps(12, args)
    assert (steps["batches_an_epoch"], steps["steps_an_epoch"], steps["steps"]) == (3, 2, 2)


SHAPE = ModelShape(
    parameters=1000,
    linear=800,
    adapter=100,
    adapter_inputs=40,
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    head_dim=4,
    key_value_heads=1,
    norms=2,
    vocabulary=50,
    eager=False,
)
WORK = Workload(10, 5, 4, rows=2, generation_rows=4, candidates=1, num_items=6, forward_tokens=60)


def parts(shape=SHAPE, **precision):
    usual = {"weight_bytes": 4, "quantised": None, "half": False, "checkpointing": True, "optimizer": "adamw_torch"}
    return memory_plan(shape, WORK, Precision(**{**usual, **precision}))


def test_what_is_trained_and_how_it_is_shared_out():
    """100 float32 adapter weights: 400 bytes, their two moments 800, their gradients 400, under DDP once more."""
    one = parts()
    assert (one["weights"], one["adapter"], one["optimizer"], one["table"]) == (4000, 400, 800, 6 * 8 * 4)
    assert parts(processes=4)["train"] == one["train"] + 400
    for stage, name in ((1, "optimizer"), (3, "weights"), (3, "adapter")):
        assert parts(processes=4, zero_stage=stage)[name] == one[name] / 4
        assert parts(processes=4, zero_stage=stage - 1)[name] == one[name]
    shared = [parts(processes=4, zero_stage=stage)["train"] for stage in (1, 2, 3)]
    assert [one["train"] - train for train in shared] == [0, 300, 300]
    assert parts(quantised="nf4")["adapter"] == 200 and parts(optimizer="paged_adamw_8bit")["optimizer"] == 200
    whole = parts(replace(SHAPE, adapter=0), weight_bytes=2)
    assert (whole["weights"], whole["adapter"], whole["optimizer"]) == (2000, 0, 4000)
    assert parts(table_slices=3)["table"] == 6 * 8 * 4 / 3
    assert one["peak"] == sum(one[name] for name in ("weights", "adapter", "optimizer", "table", "workspace")) + max(
        one[name] for name in ("generate", "score", "train")
    )


def test_rollouts_of_vllm_take_no_cache_of_ours_and_an_engine_that_sleeps_no_room_in_training():
    own, served = parts(), parts(own_rollouts=False)
    assert own["generate"] > 0 == served["generate"] and served["vllm"] == 0
    here = parts(own_rollouts=False, vllm_bytes=5000.0)
    asleep = parts(own_rollouts=False, vllm_bytes=5000.0, vllm_sleeps=True)
    assert (here["vllm"], here["generate"], asleep["vllm"], asleep["generate"]) == (5000, 0, 0, 5000)
    assert (
        here["peak"]
        == served["peak"] + 5000
        > asleep["peak"]
        == pytest.approx(served["peak"] + max(0, 5000 - max(served["train"], served["score"])))
    )
