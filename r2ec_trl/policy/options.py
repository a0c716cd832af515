"""
Options of GRPOConfig, TrainingArguments and ModelConfig that are refused. `tests/policy/test_options.py` says of every
other one whether all of us obey it or its meaning touches TRL's half alone, and fails when a release brings another.
"""

import dataclasses
import os
from typing import Any

from r2ec_trl.errors import UserError

_EVALUATES = (
    "is for evaluation by batches of losses; ours ranks the catalogue (`forward_token_budget` sets its batches)"
)
_SAMPLES = "would shape sampled reasonings alone: greedy evaluation, bundles and recommendations do not know it"
_COMPILES = "would compile the forward that the answer state is read from; leave it out"
_SHARDS = "would share out the weights in a way our forwards were not tried with; use several processes or DeepSpeed"
REFUSED: dict[str, str] = {  # name: why, and the way out; any value but the default is refused
    "model_init_kwargs": "is not read; use `dtype`, `attn_implementation`, `model_revision`, or pass a loaded model",
    "use_liger_kernel": "would compute the loss apart from the answer states; leave it out",
    "liger_kernel_config": "belongs to `use_liger_kernel`, which is not supported; leave it out",
    "torch_compile": _COMPILES,
    "torch_compile_backend": _COMPILES,
    "torch_compile_mode": _COMPILES,
    "cast_lm_head_to_fp32": "is not kept in a bundle, which would reason otherwise; use `dtype` float32",
    "repetition_penalty": _SAMPLES,
    "generation_kwargs": _SAMPLES,
    "vllm_structured_outputs_regex": _SAMPLES,
    "neftune_noise_alpha": "adds noise to every training forward, so old and new log-probabilities cannot agree",
    "label_smoothing_factor": "has no place in this objective; leave it out",
    "auto_find_batch_size": "would change the batch, and with it the objective; lower `per_device_train_batch_size`",
    "enable_jit_checkpoint": "would save at SIGTERM beside our own checkpoint, which all processes agree on",
    "train_sampling_strategy": "would take users in another order than checkpoints resume; leave it at 'random'",
    "prediction_loss_only": _EVALUATES,
    "eval_do_concat_batches": _EVALUATES,
    "eval_use_gather_object": _EVALUATES,
    "eval_accumulation_steps": _EVALUATES,
    "include_for_metrics": _EVALUATES,
    "batch_eval_metrics": _EVALUATES,
    "bf16_full_eval": _EVALUATES,
    "fp16_full_eval": _EVALUATES,
    "label_names": _EVALUATES,
    "max_tool_calling_iterations": "is for tools, which a rollout has none of; leave it out",
    "remove_unused_columns": "would drop the users' targets; leave it False",
    "fsdp": _SHARDS,
    "fsdp_config": _SHARDS,
    "parallelism_config": _SHARDS,
    "lora_task_type": "is always CAUSAL_LM here; leave it out",
}
LENGTH_KWARGS = {"min_new_tokens", "min_tokens"}  # of `generation_kwargs`: how long a sampled reasoning is at least


def check_options(settings: Any) -> None:
    """Raise [`UserError`] for an option, of a dataclass as it was given, that part of us would not obey."""
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        default = one.default if one.default is not dataclasses.MISSING else None
        if one.name not in REFUSED or value == default or value in (None, "", [], {}):
            continue
        if one.name == "generation_kwargs" and isinstance(value, dict) and set(value) <= LENGTH_KWARGS:
            continue
        raise UserError(f"`{one.name}` {REFUSED[one.name]}.")


LAUNCHES = {  # environment variables by which accelerate is told to share out weights
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
DEVICES = ("cpu", "cuda")


def check_launch(device: str | None = None) -> None:
    """
    Raise [`UserError`] for a launch that was never shown to give the figures of one process, or for the type of device
    that accelerate chose.
    """
    for variable, kind in LAUNCHES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"This launch asks for {kind}, which is not supported; launch with accelerate_configs/multi_gpu.yaml, "
                "zero2.yaml or zero3.yaml."
            )
    if device is not None and device not in DEVICES:
        raise UserError(f"The device is {device!r}, on which nothing was tried; add `--use_cpu`, or use a CUDA GPU.")
