"""Products by oneDNN against PyTorch's own, in value and gradient, alone and within a model."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from r2ec_trl.policy import linear
from r2ec_trl.policy.answer_state import add_answer_state, encode_states

SENTENCES = [[5, 6, 7, 1, 2], [9, 3, 3], [4] * 11]


@pytest.fixture
def on(monkeypatch):
    """As on a processor where it pays, for layers of any width."""
    monkeypatch.setattr(linear, "_slow_mkl", lambda: True)
    monkeypatch.setattr(linear, "WIDE", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients_are_pytorchs(on, bias, frozen):
    results = []
    for function in (F.linear, linear.linear):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 40, requires_grad=True)
        weight = torch.randn(24, 40, requires_grad=not frozen)
        offset = torch.randn(24, requires_grad=True) if bias else None
        out = function(x, weight, offset)
        leaves = [leaf for leaf in (x, weight, offset) if leaf is not None and leaf.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-5, atol=1e-3)


def test_a_policy_gives_the_same_states_and_gradients(on, tiny_model, monkeypatch):
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    add_answer_state(model.get_base_model())
    taken, results = [], []
    product = linear.product
    monkeypatch.setattr(linear, "product", lambda *words: taken.append(1) or product(*words))
    for pays in (True, False):
        monkeypatch.setattr(linear, "_slow_mkl", lambda pays=pays: pays)
        states = encode_states(model, SENTENCES, 0)
        gradients = torch.autograd.grad(
            states.square().sum(), [p for p in model.parameters() if p.requires_grad][2:20]
        )
        results.append([states, *gradients])
        if pays:
            assert len(taken) > 50
            taken.clear()
    assert not taken
    for fast, plain in zip(*results, strict=True):
        assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["narrow", "half", "autocast", "intel", "flag"])
def test_what_it_does_not_serve_is_pytorchs(on, monkeypatch, why):
    monkeypatch.setattr(linear, "product", None)
    dtype = torch.bfloat16 if why == "half" else torch.float32
    x, weight = torch.randn(2, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    if why == "narrow":
        monkeypatch.setattr(linear, "WIDE", 9)
    if why == "intel":
        monkeypatch.setattr(linear, "_slow_mkl", lambda: False)
    if why == "flag":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
        monkeypatch.setattr(linear, "pays", lambda matrix: torch.backends.mkldnn.enabled)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert torch.equal(linear.linear(x, weight), F.linear(x, weight))


def test_checkpointed_layers_are_recomputed_as_they_were(on, tiny_model):
    """The backward pass runs them again, out of the mode: the states' gradient is that of the model without."""
    results = []
    for checkpointing in (True, False):
        model = tiny_model("llama").train()
        add_answer_state(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        encode_states(model, SENTENCES, 0).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for checkpointed, plain in zip(*results, strict=True):
        assert torch.allclose(checkpointed, plain, rtol=1e-4, atol=1e-4)
