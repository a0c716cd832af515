"""Steps of a run, counted as the trainer counts them."""

from r2ec_trl.cli.memory import optimizer_steps
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
