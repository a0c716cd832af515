"""ContrastiveTrainer: M8 of the equations, gradient to both sides, and it learns."""

import pytest
import torch
from datasets import Dataset
from oracle import distance, double_model, forward, gradient_of, unit
from peft import LoraConfig
from transformers import TrainerCallback

from r2ec_trl.errors import UserError

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}


class Gradients(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


@pytest.mark.parametrize("peft", [True, False])
def test_loss_and_gradient_are_those_of_m8(make_contrastive, tiny_model, shop, peft):
    """Eight users, two of whom share a target, one by one in float64."""
    rows, caught = shop["train"].to_list(), Gradients()
    twin = next(row for row in rows[8:] if row["target"] == rows[0]["target"])
    trainer = make_contrastive(peft=peft, callbacks=[caught], train=Dataset.from_list([*rows[:7], twin]))
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    users, table = list(trainer.train_dataset), trainer.table
    trainer.train()
    model = double_model(tiny_model("llama"), LoraConfig(**LORA) if peft else None)
    model.load_state_dict(weights)
    targets = sorted({user["target_row"] for user in users})
    assert len(targets) < 8
    rows = torch.stack([unit(forward(model, table.token_ids[row])[1][-1]) for row in targets])
    terms = []
    for user in users:
        assert user["sequence"] == trainer.prompts.user_ids(user) + trainer.prompts.marker_ids
        scores = rows @ unit(forward(model, user["sequence"])[1][-1]) / 0.1
        terms.append(-torch.log_softmax(scores, dim=0)[targets.index(user["target_row"])])
    loss = sum(terms) / len(terms)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    expected = gradient_of(loss, model)
    expected = {name: value for name, value in expected.items() if name in caught.gradients[0]}
    difference, norm = distance(caught.gradients[0], expected)
    assert difference < 1e-3 * norm and norm > 0.1


def test_accumulation_is_the_mean_over_micro_batches(make_contrastive, shop):
    results = []
    for accumulation in (1, 2):
        caught = Gradients()
        train = shop["train"].select(range(8)) if accumulation == 1 else shop["train"].select([*range(8), *range(8)])
        trainer = make_contrastive(train=train, gradient_accumulation_steps=accumulation, callbacks=[caught])
        trainer._get_train_sampler = lambda *args, data=train: torch.utils.data.SequentialSampler(data)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], caught.gradients[0]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    difference, norm = distance(results[0][1], results[1][1])
    assert difference < 1e-5 * norm


def test_both_sides_of_the_score_get_gradient(make_contrastive, monkeypatch):
    import r2ec_trl.training.contrastive_trainer as module

    inner, caught = module.contrastive_loss, []

    def noting(states, rows, *rest):
        states.retain_grad(), rows.retain_grad()
        caught.extend([states, rows])
        return inner(states, rows, *rest)

    monkeypatch.setattr(module, "contrastive_loss", noting)
    make_contrastive().train()
    assert all(tensor.grad.norm() > 0 for tensor in caught)


def test_validation_rises_and_the_row_cosine_is_logged(make_contrastive):
    trainer = make_contrastive(max_steps=25, learning_rate=3e-3, per_device_train_batch_size=16)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_recommendation/ndcg@10"] > before["eval_recommendation/ndcg@10"] + 0.1
    assert after["eval_recommendation/reasoning_tokens"] == 0
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"] and "item/mean_pairwise_cosine" in losses[0]


def test_dropout_is_off_in_the_adapter_too(make_contrastive):
    trainer = make_contrastive(dropout=0.5)
    assert all(module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_families_and_checkpointing_train(make_contrastive, family):
    trainer = make_contrastive(family=family, gradient_checkpointing=True)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_fewer_users_than_a_batch_is_an_error(make_contrastive, shop):
    with pytest.raises(UserError, match="7 users, fewer than one batch of 8"):
        make_contrastive(train=shop["train"].select(range(7)))
    with pytest.raises(UserError, match="A batch of one user has no negatives"):
        make_contrastive(per_device_train_batch_size=1)
    with pytest.raises(UserError, match="'i99' is not in the catalogue"):
        make_contrastive(train=shop["train"].from_list([{**shop["train"][0], "target": "i99"}] * 8))


def test_a_sampled_warm_start_reasons_reports_and_says_what_it_sampled(make_contrastive, tmp_path):
    trainer = make_contrastive(reasoning="sampled", max_completion_length=4, max_eval_users=6, stop_coef=0.5)
    trainer.train()
    log, report = trainer.state.log_history[0], trainer.reasoning_report
    assert log["loss"] == pytest.approx(log["loss/item"] + 0.5 * log["loss/stop"], abs=1e-4)
    assert 0 < log["rollout/mean_length"] <= 4 and log["rollout/missing_marker"] == 1
    assert report["none_to_full"]["rows"] == 6 and report["missing_marker"] == 1
    last = trainer.state.log_history[-1]
    ndcg = report["none_to_full"]["unmasked"]["ndcg@10"]
    assert last["eval_reasoning/full_minus_none"] == pytest.approx(ndcg["after"] - ndcg["before"])
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert trainer.evaluate()["eval_recommendation/reasoning_tokens"] > 0
    assert make_contrastive().reasoning_report is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reasoning": "some"}, "give none or sampled"),
        ({"stop_coef": 1.0}, "add `--reasoning sampled`"),
        ({"reasoning": "sampled", "taught_words": 3}, "says what `stop_coef` teaches"),
        ({"num_generations": 3}, "`num_generations` is for sampled reasonings"),
        ({"temperature": 0.5}, "`temperature` is for sampled reasonings"),
        ({"min_reward_spread": 0.1}, "add `--reasoning sampled`"),
        ({"reasoning": "sampled", "reasoning_share": 0.0}, "nobody would reason"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(make_contrastive, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make_contrastive(**settings)
