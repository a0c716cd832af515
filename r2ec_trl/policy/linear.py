"""
Linear layers on a CPU by oneDNN in place of MKL, in the same float32: on processors other than Intel's MKL leaves
AVX-512 alone, and a product takes twice the time (one thread of AMD Zen 5: 105 against 235 GFLOP/s).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

WIDE = 512  # features on a layer's longer side from which on it pays


@functools.cache
def _slow_mkl() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    other = cpuinfo.exists() and "GenuineIntel" not in cpuinfo.read_text()
    return other and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def pays(matrix: torch.Tensor) -> bool:
    """Whether [`product`] is the faster one for a matrix; never with `torch.backends.mkldnn.set_flags(False)`."""
    here = matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.numel() > 0
    return here and _slow_mkl() and bool(torch.backends.mkldnn.enabled)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def served(weight: torch.Tensor) -> bool:
    """Whether [`linear`] takes a layer's weight to oneDNN."""
    return weight.ndim == 2 and max(weight.shape) >= WIDE and pays(weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, gradients included, by oneDNN where that is faster."""
    plain = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or x.numel() == 0 or not served(weight)
    return F.linear(x, weight, bias) if plain else _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = product(flat.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, flat.sum(dim=0) if ctx.needs_input_grad[2] else None


class FastLinear(TorchFunctionMode):
    """Within it, every `torch.nn.functional.linear` is [`linear`]."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Takes over one function."""
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


def fast_linear(weight: torch.Tensor) -> AbstractContextManager:
    """[`FastLinear`] where it [`pays`] for a model with such weights."""
    return FastLinear() if pays(weight) else nullcontext()
