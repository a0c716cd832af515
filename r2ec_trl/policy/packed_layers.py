"""Decoding on a CPU with weights laid out for it: a copy of each linear layer's, the adapter's product in it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora

from r2ec_trl.policy.linear import product, served

PACKED_BYTES = 2**31  # of weights laid out anew, at most
PACKED_ROWS, PACKED_STEPS = 4, 6  # from which on that pays


@contextmanager
def packed_layers(model: torch.nn.Module, rows: int, steps: int) -> Iterator[None]:
    """
    Within it the model's float32 linear layers run on copies of their weights that are laid out for `rows` rows, the
    adapter's product added: base and adapter themselves are not written to. Without gradient.

    Args:
        model (`torch.nn.Module`):
            A base model, an adapter's layers in it.
        rows (`int`):
            Rows of a step.
        steps (`int`):
            How often each layer will run: laying out costs about as much as two steps.
    """
    inner = {part for layer in model.modules() if isinstance(layer, lora.LoraLayer) for part in layer.modules()}
    layers = [layer for layer in model.modules() if layer not in inner or isinstance(layer, lora.LoraLayer)]
    layers = [layer for layer in layers if _can_be_packed(layer)]
    size = sum(_base(layer).weight.nbytes for layer in layers)
    autocast = torch.is_autocast_enabled("cpu")  # inputs in 16 bits then, as the layers would take them
    if autocast or rows < PACKED_ROWS or steps < PACKED_STEPS or size > PACKED_BYTES:
        layers = []
    try:
        for layer in layers:
            layer.forward = functools.partial(product, weight=_packed(layer, rows), bias=_base(layer).bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, lora.Linear) else layer


def _adapters(layer: Any) -> list[str]:
    if layer is _base(layer) or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _can_be_packed(layer: Any) -> bool:
    """A linear layer with nobody's hands on it, or one under plain LoRA."""
    base = _base(layer)
    if type(base) is not torch.nn.Linear or "forward" in {*vars(layer), *vars(base)} or not served(base.weight):
        return False
    if layer is base:
        return True
    dropout = layer.training and any(type(layer.lora_dropout[name]) is torch.nn.Dropout for name in _adapters(layer))
    other = layer.merged or layer.lora_variant or any(layer.lora_bias.values())
    return type(layer) is lora.Linear and not (other or dropout)


def _packed(layer: Any, rows: int) -> torch.Tensor:
    weight = _base(layer).weight.detach()
    for name in _adapters(layer):
        weight = weight + layer.get_delta_weight(name).to(weight)
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
