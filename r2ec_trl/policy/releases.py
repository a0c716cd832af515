"""The few names that differ between the releases of transformers which setup.cfg admits; no other module asks."""

import inspect
from typing import Any

from transformers import PreTrainedModel


def cache_name(model: PreTrainedModel) -> str:
    """The argument of a model's forward that takes its cache: `cache`, or once `past_key_values`."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether layers are recomputed in the backward pass: `is_activation_checkpointing`, once `…gradient…`."""
    if hasattr(type(model), "is_activation_checkpointing"):
        return bool(model.is_activation_checkpointing)
    return bool(model.is_gradient_checkpointing)


def set_checkpointing(args: Any, value: Any) -> None:
    """
    Give `gradient_checkpointing` of some [`~transformers.TrainingArguments`] its value (true, false, or `"auto"` until
    that is settled) under both names: newer transformers read `activation_checkpointing`.
    """
    args.gradient_checkpointing = value
    if hasattr(args, "activation_checkpointing"):
        args.activation_checkpointing = value
        how = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs
        args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = how
