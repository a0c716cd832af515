"""The range of every numeric setting, ours and those of TRL's that we set or use: one table, checked in one place."""

import dataclasses
import math
import sys
from typing import Any

from r2ec_trl.errors import UserError

_FROM_0, _ABOVE_0, _FROM_1, _SHARE = "[0, inf)", "(0, inf)", "[1, inf)", "[0, 1]"
_SEED, _PORT = f"[0, {2**32 - 1}]", "[0, 65535]"
RANGES: dict[str, str] = {  # ( and ) leave the end out; numbers before | are allowed besides
    # prompts, scoring, evaluation
    **dict.fromkeys(("field_words", "max_history_items", "max_prompt_length", "max_item_length"), _FROM_1),
    **dict.fromkeys(("max_eval_users", "max_test_users", "forward_token_budget", "max_completion_length"), _FROM_1),
    **dict.fromkeys(("k", "part_users", "early_stopping_patience"), _FROM_1),
    **dict.fromkeys(("rounds", "steps", "users", "batch_users", "threads"), _FROM_1),
    **dict.fromkeys(("item_temperature", "max_seconds"), _ABOVE_0),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    **dict.fromkeys(("shown_rollouts", "watch_steps"), _FROM_0),
    "port": _PORT,
    # the objective
    **dict.fromkeys(("token_coef", "item_coef", "contrastive_coef", "table_refresh_budget"), _FROM_0),
    **dict.fromkeys(("stop_coef", "taught_words", "min_reward_spread", "soft_punish_cache"), _FROM_0),
    **dict.fromkeys(("beta", "epsilon", "epsilon_high", "entropy_coef", "off_policy_mask_threshold"), _FROM_0),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"), _FROM_0),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), _FROM_0),
    **dict.fromkeys(("delta", "sapo_temperature_pos", "sapo_temperature_neg"), _ABOVE_0),
    **dict.fromkeys(("reward_mix", "habits", "reasoning_share", "no_history_share"), _SHARE),
    **dict.fromkeys(("top_entropy_quantile", "ref_model_mixup_alpha"), _SHARE),
    **dict.fromkeys(("reward_cutoff", "table_refresh_steps", "num_iterations", "ref_model_sync_steps"), _FROM_1),
    "router_aux_loss_coef": _FROM_0,
    "reward_weights": "(-inf, inf)",
    # rollouts
    **dict.fromkeys(
        ("num_generations", "num_generations_eval", "generation_batch_size", "steps_per_generation"), _FROM_1
    ),
    **dict.fromkeys(("temperature", "repetition_penalty", "vllm_server_timeout"), _ABOVE_0),
    **dict.fromkeys(("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"), _ABOVE_0),
    "vllm_importance_sampling_clip_min": _FROM_0,
    "top_p": "(0, 1]",
    "top_k": _FROM_0,
    "min_p": _SHARE,
    "vllm_gpu_memory_utilization": "(0, 1]",
    **dict.fromkeys(("vllm_max_model_length", "vllm_tensor_parallel_size", "num_completions_to_print"), _FROM_1),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), _PORT),
    # optimisation
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_delay"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
    **dict.fromkeys(("adam_epsilon", "num_train_epochs", "ddp_timeout", "ddp_bucket_cap_mb"), _ABOVE_0),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _FROM_1
    ),
    **dict.fromkeys(
        ("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "pad_to_multiple_of"), _FROM_1
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _ABOVE_0),
    "dataloader_num_workers": _FROM_0,
    "max_steps": "-1 | [1, inf)",
    # LoRA
    "lora_r": _FROM_1,
    "lora_alpha": _ABOVE_0,
    "lora_dropout": "[0, 1)",
}


def check_ranges(settings: Any) -> None:
    """
    Raise [`UserError`] for a number of a dataclass outside its range, NaN and infinity included; fields not in
    [`RANGES`], and those that are `None`, are passed over.
    """
    for one in dataclasses.fields(settings):
        if one.name not in RANGES:
            continue
        given = getattr(settings, one.name, None)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and not _lies_in(value, RANGES[one.name])
            ):
                allowed = _words(RANGES[one.name])
                if not abs(value) <= sys.float_info.max and "finite" not in allowed:
                    allowed = f"finite and {allowed}"
                raise UserError(f"`{one.name}` is {value}; it must be {allowed}.")


def _lies_in(value: float, text: str) -> bool:
    special, _, interval = text.rpartition("|")
    if special and value == float(special):
        return True
    low, high = (float(end) for end in interval.strip()[1:-1].split(","))
    if abs(value) > sys.float_info.max:  # an integer beyond every float, and infinity
        return False
    above = value >= low if "[" in interval else value > low
    below = value <= high if "]" in interval else value < high
    return math.isfinite(value) and above and below


def _words(text: str) -> str:
    special, _, interval = text.rpartition("|")
    low, high = (end.strip() for end in interval.strip()[1:-1].split(","))
    lower = "" if low == "-inf" else f"at least {low}" if "[" in interval else f"above {low}"
    upper = "" if high == "inf" else f"at most {high}" if "]" in interval else f"below {high}"
    words = " and ".join(part for part in (lower, upper) if part) or "a finite number"
    return f"{words} (or {special.strip()})" if special else words
