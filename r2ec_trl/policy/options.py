"""
Every option of GRPOConfig, TrainingArguments and ModelConfig: obeyed by training, evaluation, items, bundle and
recommendations alike; TRL's alone (its meaning touches the training half only); or refused.
`tests/policy/test_options.py` fails when a release brings a field that stands nowhere here.
"""

import dataclasses
import os
from typing import Any

from r2ec_trl.errors import UserError

OBEYED: dict[str, str] = {  # name: the test in which it changes what we do
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed", "use_cpu", "steps_per_generation"),
        "tests/test_distributed.py::test_same_numbers_everywhere",
    ),
    **dict.fromkeys(
        (
            "generation_batch_size",
            "num_iterations",
            "loss_type",
            "epsilon",
            "epsilon_high",
            "importance_sampling_level",
        ),
        "tests/test_distributed.py::test_same_numbers_under_other_settings",
    ),
    "num_generations": "tests/training/test_recpo_trainer.py::test_a_user_gets_as_many_rollouts_as_are_asked_for",
    "scale_rewards": "tests/test_mistakes.py::test_5_rloo_is_leave_one_out_and_sums_to_zero",
    "reward_weights": "tests/training/test_recpo_trainer.py::test_several_rewards_with_weights_none_and_async",
    "multi_objective_aggregation": (
        "tests/training/test_recpo_trainer.py::test_equal_rewards_teach_nothing_and_break_nothing"
    ),
    "mask_truncated_completions": (
        "tests/training/test_recpo_trainer.py::test_truncated_rollouts_are_masked_and_carry_no_item_term"
    ),
    "chat_template_kwargs": "tests/policy/test_chat.py::test_variables_of_the_template_reach_every_prompt",
    "disable_dropout": "tests/policy/test_checks.py::test_functional_dropout_is_off_and_measured",
    "trust_remote_code": "tests/policy/test_checks.py::test_code_of_a_model_runs_only_when_it_is_asked_for",
    "optim": "tests/training/test_optimizer.py::test_a_gpu_gets_the_papers_optimizer_and_a_cpu_the_plain_one",
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"),
        "tests/evaluation/test_users.py::test_best_model_and_early_stopping_by_hfs_flags",
    ),
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
        "tests/training/test_recpo_config.py::test_importance_correction_is_off_under_truncated_sampling",
    ),
    **dict.fromkeys(
        ("bf16", "dtype", "attn_implementation", "max_completion_length", "model_name_or_path"),
        "tests/test_flags.py::test_an_option_holds_in_every_place",
    ),
    "fp16": "tests/cli/test_bundle_choice.py::test_a_run_in_bfloat16_is_loaded_as_one",  # the same autocast
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        "tests/training/test_optimizer.py::test_qlora_steps_leave_the_base_as_it_was_bit_for_bit",
    ),
    **dict.fromkeys(
        ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save"),
        "tests/policy/test_options.py::test_lora_options_reach_the_adapter",
    ),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_target_modules", "lora_target_parameters"),
        "tests/policy/test_options.py::test_lora_options_reach_the_adapter",
    ),
    "model_revision": "tests/cli/test_bundle_choice.py::test_the_base_is_asked_for_in_the_revision_it_had",
}
NEWER = frozenset({"activation_checkpointing", "activation_checkpointing_kwargs"})  # not in every transformers
TRLS = NEWER | frozenset("""
    accelerator_config adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices beta cache_implementation
    data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug delta
    disable_tqdm do_eval do_predict do_train ds3_gather_for_generation entropy_coef entropy_coef_delta
    entropy_coef_max entropy_coef_min entropy_target eval_delay eval_on_start eval_steps eval_strategy
    full_determinism gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_num_input_tokens_seen
    learning_rate length_column_name load_best_model_at_end local_rank log_completions log_completions_hub_repo
    log_level log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm
    max_steps min_p num_completions_to_print num_generations_eval num_train_epochs off_policy_mask_threshold
    optim_args optim_target_modules output_dir pad_to_multiple_of per_device_eval_batch_size project push_to_hub
    ref_model_mixup_alpha ref_model_sync_steps report_to restore_callback_states_from_checkpoint
    resume_from_checkpoint router_aux_loss_coef run_name sapo_temperature_neg sapo_temperature_pos
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset
    skip_memory_metrics sync_ref_model temperature tf32 top_entropy_quantile top_k top_p torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id transformers_continuous_batching_config
    use_adaptive_entropy use_bias_correction_kl use_cache use_transformers_continuous_batching
    use_transformers_paged use_vllm vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_max_model_length vllm_mode
    vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_tensor_parallel_size warmup_steps weight_decay
    """.split())
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
    """
    Raise [`UserError`] for an option that part of us would not obey.

    Args:
        settings (dataclass):
            The arguments of a trainer, a recipe or a model, as they were given.
    """
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
    Raise [`UserError`] for a launch that was never shown to give the figures of one process.

    Args:
        device (`str`, *optional*):
            Type of the device that accelerate chose.
    """
    for variable, kind in LAUNCHES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"This launch asks for {kind}, which is not supported; launch with accelerate_configs/multi_gpu.yaml, "
                "zero2.yaml or zero3.yaml."
            )
    if device is not None and device not in DEVICES:
        raise UserError(f"The device is {device!r}, on which nothing was tried; add `--use_cpu`, or use a CUDA GPU.")
