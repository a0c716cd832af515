"""ContrastiveTrainer: M8 of the equations, gradient to both sides, and it learns."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from oracle import distance, double_model, forward, gradient_of, unit
from peft import LoraConfig
from transformers import TrainerCallback

from r2ec_trl.errors import UserError
from r2ec_trl.metrics import ndcg_at_k

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


def test_another_process_has_further_negatives(make_contrastive, monkeypatch):
    """Its targets are candidates too: the softmax has more to share, so the loss is larger."""
    trainer = make_contrastive()
    batch = trainer._collate([trainer.train_dataset[row] for row in range(8)])
    others = [row for row in range(len(trainer.table)) if row not in batch["targets"]][:5]
    losses = []
    for more in ([], others):
        place = "r2ec_trl.training.contrastive_trainer.gather_object"
        monkeypatch.setattr(place, lambda own, more=more: [*more, *own])
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] > losses[0] + 0.01


def test_a_batch_is_never_short_of_negatives(make_contrastive, shop):
    """Eleven users in batches of eight: the other three wait for the next epoch's shuffle."""
    trainer = make_contrastive(train=shop["train"].select(range(11)))
    assert [len(batch["targets"]) for batch in trainer.get_train_dataloader()] == [8]


def test_the_seed_decides_where_the_adapter_starts(make_contrastive):
    starts = []
    for noise, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(noise)
        trainer = make_contrastive(seed=seed)
        starts.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_loss_that_is_no_number_stops_the_run_and_saves_the_rows(make_contrastive, tmp_path, monkeypatch):
    trainer = make_contrastive()
    monkeypatch.setattr(
        "r2ec_trl.training.contrastive_trainer.contrastive_loss", lambda states, *_: states.sum() * torch.nan
    )
    with pytest.raises(UserError, match="The loss is nan at step 0; its rows are in"):
        trainer.train()
    rows = json.loads((tmp_path / "faults" / "step0-process0.json").read_text())
    assert len(rows) == 8 and all(row["input_ids"] and "targets" in row for row in rows)


def test_figures_are_of_the_steps_since_the_newest_log(make_contrastive):
    """
    A run that goes on between two logs has the same figures as the others; each log has those of its own two steps.
    """
    settings = {"reasoning": "sampled", "max_completion_length": 2, "max_eval_users": 2, "logging_steps": 2}
    trainer = make_contrastive(max_steps=4, save_strategy="steps", save_steps=1, **settings)
    series, seen, inner = trainer.telemetry.series, [], trainer.sampled.loss
    trainer.sampled.loss = lambda *args: (inner(*args), seen.append(series["loss/item"][-1]))[0]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss/item"] for log in logs] == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:]) / 2])
    assert logs[0]["item/mean_pairwise_cosine"] != logs[1]["item/mean_pairwise_cosine"]
    shutil.rmtree(f"{trainer.args.output_dir}/checkpoint-4")
    again = make_contrastive(max_steps=4, **settings)
    again.train(resume_from_checkpoint="latest")
    (log,) = [log for log in again.state.log_history if log.get("step") == 4 and "loss" in log]
    assert log.keys() == logs[1].keys() and log["loss/item"] == pytest.approx(seen[3], abs=1e-4)


class Stop(TrainerCallback):
    """A stop as sudden as an exception when step 2 is saved."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_where_the_unbroken_one_does(make_contrastive, shop):
    """Within an epoch of five micro-batches, two a step: the same users, sampled reasonings and weights."""
    settings = {"reasoning": "sampled", "max_completion_length": 2, "max_eval_users": 2, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    ends = []
    for callbacks, resume in (([], None), ([Stop()], None), ([], "latest")):
        torch.manual_seed(len(ends))  # of the process, which is another one
        train = shop["train"].select(range(22))
        trainer = make_contrastive(train=train, callbacks=callbacks, max_steps=3, save_steps=2, **settings)
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            continue
        trainer.train(resume_from_checkpoint=resume)
        ends.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *ends))


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


def test_a_sampled_warm_start_reasons_reports_and_says_what_it_sampled(make_contrastive, shop, tmp_path):
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
    for mode, frame in ((mode, trainer.evaluate_frame(shop["validation"], mode)[:6]) for mode in ("none", "full")):
        assert last[f"eval_reasoning/{mode}"] == pytest.approx(float(ndcg_at_k(frame["rank"].to_numpy(), 10).mean()))
    assert abs(last["eval_reasoning/full"] - last["eval_reasoning/none"]) > 0.01
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
