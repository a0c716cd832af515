"""Validation reasons greedily over the whole catalogue, and no longer than it may."""

import polars as pl
import pytest

from r2ec_trl.errors import UserError


def test_figures_are_those_of_the_first_users_alone(make_trainer, shop):
    trainer = make_trainer(max_eval_users=4, max_completion_length=5)
    frame = trainer.evaluate_frame(shop["validation"])
    metrics = trainer.evaluate()
    assert metrics["eval_recommendation/hit@10"] == pytest.approx(
        float((frame["rank"][:4] <= 10).cast(pl.Float64).mean())
    )
    assert frame["user_id"].to_list() == shop["validation"]["user_id"][:] and max(frame["reasoning_tokens"]) == 5
    assert set(trainer.evaluate_frame(shop["validation"], reasoning="none")["reasoning_tokens"]) == {0}


def test_nobody_to_evaluate_is_one_sentence(make_trainer, shop):
    with pytest.raises(UserError, match="`eval_dataset` is empty; give at least one user"):
        make_trainer().evaluate(shop["validation"].select([]))


@pytest.mark.parametrize("masked", [False, True])
def test_the_gap_between_training_and_validation_is_logged_once_a_while(make_trainer, masked):
    """Validation has its histories masked where training has."""
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, max_eval_users=4, mask_history=masked)
    name = "eval_recommendation/masked_ndcg@10" if masked else "eval_recommendation/ndcg@10"
    trainer.train()
    logs = trainer.state.log_history
    gains = [log["recommendation/ndcg@10"] for log in logs if "recommendation/ndcg@10" in log]
    for gain, log in zip(gains, [log for log in logs if name in log], strict=True):
        assert log["eval_recommendation/train_gap"] == pytest.approx(gain - log[name])
    assert not masked or logs[1]["eval_recommendation/ndcg@10"] != logs[1][name]
    assert "eval_recommendation/train_gap" not in trainer.evaluate()


def test_the_gap_is_to_the_mean_of_all_batches_since_the_last_evaluation(make_trainer):
    trainer = make_trainer(max_eval_users=2)
    trainer.telemetry.train_ndcg += [0.2, 0.3, 0.7]
    metrics = trainer.evaluate()
    assert metrics["eval_recommendation/train_gap"] == pytest.approx(0.4 - metrics["eval_recommendation/ndcg@10"])


def test_an_evaluation_encodes_the_table_with_the_weights_as_they_are(make_trainer, change_weights, shop):
    """A second one, after the weights have changed, is that of a trainer that saw no other weights."""
    trainer, frames = make_trainer(max_completion_length=1), []
    before = trainer.evaluate_frame(shop["validation"])
    change_weights(trainer.model)
    for clears in (False, True):
        if clears:
            trainer.table.clear()
        trainer.model.train(clears)
        frames.append(trainer.evaluate_frame(shop["validation"]))
        assert trainer.model.training is clears
    assert frames[0].equals(frames[1]) and not frames[0]["rank"].equals(before["rank"])


def test_an_evaluation_between_two_logs_keeps_training_figures_apart(make_trainer):
    """TRL would log them as the evaluation's, and the next log would lack them."""
    trainer = make_trainer(max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1, max_eval_users=2)
    trainer.train()
    first, second = [
        log for log in trainer.state.log_history if "loss" in log or "eval_recommendation/ndcg@10" in log
    ][:2]
    assert first["step"] == 1 and all(name.startswith("eval_") for name in first.keys() - {"step", "epoch"})
    assert second["step"] == 2 and "reward" in second and "completions/mean_length" in second
