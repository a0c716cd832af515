"""Decoding on packed weights: the same logits, nothing written to, and nothing packed where it does not pay."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r2ec_trl.policy import linear, packed_layers
from r2ec_trl.policy.packed_layers import packed_layers as packed

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 3, 1], [2, 2, 4, 4], [1, 2, 3, 4]])


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setattr(linear, "_slow_mkl", lambda: True)
    monkeypatch.setattr(linear, "WIDE", 0)


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, **options))


def replaced(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_the_same_logits_and_nothing_left_behind(tiny_model, model_family, adapter):
    model = tiny_model(model_family)
    if adapter:
        model = adapted(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(IDS).logits
    with packed(model, 4, 8):
        names = replaced(model)
        assert len(names) == 2 * 7 + 1 and not [name for name in names if "lora_" in name or "base_layer" in name]
        assert torch.allclose(model(IDS).logits, plain, atol=1e-4)
    assert not replaced(model)
    assert torch.equal(model(IDS).logits, plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_an_adapter_that_is_switched_off_is_not_packed(tiny_model):
    model = adapted(tiny_model("llama"))
    with model.disable_adapter():
        plain = model(IDS).logits
        with packed(model, 4, 8):
            assert torch.allclose(model(IDS).logits, plain, atol=1e-4)
    assert not torch.allclose(model(IDS).logits, plain, atol=1e-2)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_adapters_that_are_no_sum_are_left_alone(tiny_model, options):
    model = adapted(tiny_model("llama"), **options).train()
    with packed(model, 4, 8):
        assert replaced(model) == ["base_model.model.lm_head"]


@pytest.mark.parametrize("change", [{"rows": 3}, {"steps": 5}, {"most": 1000}, {"intel": True}])
def test_nothing_is_packed_where_it_does_not_pay(tiny_model, monkeypatch, change):
    model = tiny_model("llama")
    monkeypatch.setattr(packed_layers, "PACKED_BYTES", change.get("most", 2**31))
    if change.get("intel"):
        monkeypatch.setattr(linear, "_slow_mkl", lambda: False)
    with packed(model, change.get("rows", 4), change.get("steps", 6)):
        assert not replaced(model)


@torch.no_grad()
def test_an_adapter_that_is_merged_is_not_added_again(tiny_model):
    model = adapted(tiny_model("llama"))
    model.merge_adapter()
    plain = model(IDS).logits
    with packed(model, 4, 8):
        assert torch.allclose(model(IDS).logits, plain, atol=1e-4)


@torch.no_grad()
def test_autocast_is_left_to_the_layers(tiny_model):
    """`--bf16` with a float32 checkpoint: what comes in has 16 bits."""
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(IDS).logits
        with packed(model, 4, 8):
            assert not replaced(model) and torch.equal(model(IDS).logits, plain)
