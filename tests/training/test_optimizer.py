"""The default optimizer, and QLoRA: an NF4 base that no step changes."""

import logging
import os

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.training import optimizer
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.training.recpo_trainer import RecPOTrainer

SMOLLM2 = os.environ.get("SMOLLM2")  # folder of SmolLM2-135M-Instruct, where there is one


def test_a_gpu_gets_the_papers_optimizer_and_a_cpu_the_plain_one(monkeypatch, caplog, tmp_path):
    optimizer._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert RecPOConfig(str(tmp_path), use_cpu=True).optim == "adamw_torch"
        assert ContrastiveConfig(str(tmp_path), use_cpu=True).optim == "adamw_torch"
    assert caplog.text.count("plain AdamW") == 1
    assert RecPOConfig(str(tmp_path), use_cpu=True, optim="sgd").optim == "sgd"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: name if name == "bitsandbytes" else None)
    assert optimizer.resolve_optimizer("auto", use_cpu=False) == "paged_adamw_8bit"
    assert optimizer.resolve_optimizer("auto", use_cpu=True) == "adamw_torch"
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert optimizer.resolve_optimizer("auto", use_cpu=False) == "adamw_torch"
    assert "bitsandbytes is not installed" in caplog.text


class Losses(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


def train_qlora(model, shop, output_dir, steps):
    """Two users, two rollouts each, on an NF4 base; the trainer, its logs, and the base before and after."""
    pytest.importorskip("bitsandbytes")
    policy = PolicyArguments(model_name_or_path=str(model), load_in_4bit=True, use_bnb_nested_quant=True)
    model, tokenizer = load_policy(policy, trainable=True)
    losses = Losses()
    args = RecPOConfig(
        output_dir=str(output_dir),
        optim="paged_adamw_8bit",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_steps=steps,
        max_completion_length=8,
        learning_rate=1e-3,
        warmup_steps=0,
        temperature=1.0,
        user_template="Bought:\n{history}\nNext {category} after {marker}?",
        item_template="{fields}",
        item_fields=["title"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    trainer = RecPOTrainer(
        model, shop["items"], "ndcg", args, shop["train"], None, tokenizer, callbacks=[losses], peft_config=lora
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    return trainer, losses.logs, before, trainer.model.state_dict()


def assert_only_the_adapter_moved(trainer, logs, before, after, steps):
    assert len(logs) == steps and all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in logs)
    assert trainer.optimizer.optimizer.args.optim_bits == 8
    base = [name for name in before if "lora_" not in name]
    quantised = [name for name in base if before[name].dtype == torch.uint8 and "absmax" not in name]
    assert len(quantised) >= 14 and all(torch.equal(before[name], after[name]) for name in base)
    adapter = [name for name in before if "lora_" in name]
    assert adapter and not any(torch.equal(before[name], after[name]) for name in adapter)


@pytest.mark.slow  # where bitsandbytes is installed
def test_qlora_steps_leave_the_base_as_it_was_bit_for_bit(tiny_model_folder, shop, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = train_qlora(tiny_model_folder("llama"), shop, tmp_path, steps=3)
    assert_only_the_adapter_moved(*result, steps=3)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="SMOLLM2 names no folder with SmolLM2-135M-Instruct")
def test_qlora_on_smollm2(shop, tmp_path):
    result = train_qlora(SMOLLM2, shop, tmp_path, steps=3)
    assert_only_the_adapter_moved(*result, steps=3)
    states = result[0].optimizer.optimizer.state.values()
    assert any(value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("kind", [RecPOConfig, ContrastiveConfig])
def test_a_scheduler_that_watches_validation_knows_that_ndcg_rises(kind, tmp_path):
    quick = {"use_cpu": True, "report_to": "none", "lr_scheduler_type": "reduce_lr_on_plateau"}
    quick |= {"eval_strategy": "steps", "eval_steps": 1}
    given = {"patience": 2}
    assert kind(str(tmp_path), lr_scheduler_kwargs=given, **quick).lr_scheduler_kwargs == {"mode": "max", **given}
    shortest = {"metric_for_best_model": "recommendation/reasoning_tokens", "greater_is_better": False}
    assert kind(str(tmp_path), **shortest, **quick).lr_scheduler_kwargs == {"mode": "min"}
    assert kind(str(tmp_path), lr_scheduler_kwargs={"mode": "min"}, **quick).lr_scheduler_kwargs == {"mode": "min"}
    assert kind(str(tmp_path), **{**quick, "lr_scheduler_type": "linear"}).lr_scheduler_kwargs in (None, {})
