"""
Every option of GRPOConfig, TrainingArguments and ModelConfig: obeyed by training, evaluation, items, bundle and
recommendations alike; TRL's alone (its meaning touches the training half only); or refused, and then it is.
"""

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments, peft_config
from r2ec_trl.policy.options import LAUNCHES, REFUSED, check_launch
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.recpo_config import RecPOConfig

OBEYED = {  # name: the test in which it changes what we do
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
    **dict.fromkeys(
        (
            "delta",
            "sapo_temperature_neg",
            "sapo_temperature_pos",
            "vespo_k_neg",
            "vespo_k_pos",
            "vespo_lambda_neg",
            "vespo_lambda_pos",
        ),
        "tests/training/test_item_term.py::test_options_of_the_loss_reach_the_item",
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
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug
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
    resume_from_checkpoint router_aux_loss_coef run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset
    skip_memory_metrics sync_ref_model temperature tf32 top_entropy_quantile top_k top_p torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id transformers_continuous_batching_config
    use_adaptive_entropy use_bias_correction_kl use_cache use_transformers_continuous_batching
    use_transformers_paged use_vllm
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_importance_sampling_cap
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_max_model_length vllm_mode
    vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_tensor_parallel_size warmup_steps weight_decay
    """.split())
ROOT = Path(__file__).parents[2]
FIELDS = {
    field.name: field for kind in (ModelConfig, TrainingArguments, GRPOConfig) for field in dataclasses.fields(kind)
}
ODD = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "repetition_penalty": 1.2,
    "eval_accumulation_steps": 2,
}
ODD |= {"max_tool_calling_iterations": 3, "eval_do_concat_batches": False, "model_init_kwargs": {"dtype": "bfloat16"}}
ODD |= {"generation_kwargs": {"typical_p": 0.5}, "fsdp": "full_shard", "include_for_metrics": ["loss"]}


def test_every_field_is_named_once_and_none_that_is_gone():
    named = [*OBEYED, *TRLS, *REFUSED]
    assert sorted(named) == sorted(set(named))
    new, gone = set(FIELDS) - set(named), set(named) - set(FIELDS) - NEWER
    assert not new, f"a release brought {new}: obeyed or TRL's (say so here), or refused in policy/options.py?"
    assert not gone, f"a release dropped {gone}: take them out"


@pytest.mark.parametrize("test", sorted(set(OBEYED.values())))
def test_what_is_obeyed_names_a_test_that_exists(test):
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def other_value(name):
    if name in ODD:
        return ODD[name]
    default = FIELDS[name].default
    return (not default) if isinstance(default, bool) else "something"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_one_sentence_at_the_start(name, tmp_path):
    where = {"output_dir": str(tmp_path), "use_cpu": True}
    kinds = [(RecPOConfig, where), (ContrastiveConfig, where), (PolicyArguments, {})]
    holders = [(kind, more) for kind, more in kinds if name in {field.name for field in dataclasses.fields(kind)}]
    assert holders
    for kind, more in holders:
        with pytest.raises(UserError, match=f"^`{name}` [^\n]*$"):
            kind(**more, **{name: other_value(name)})
        kind(**more, **({} if name == "include_for_metrics" else {name: getattr(kind(**more), name)}))


def test_minimal_lengths_are_the_only_generation_settings(tmp_path):
    config = RecPOConfig(str(tmp_path), use_cpu=True, generation_kwargs={"min_new_tokens": 4})
    assert config.generation_kwargs == {"min_new_tokens": 4}
    with pytest.raises(UserError, match="generation_kwargs"):
        RecPOConfig(str(tmp_path), use_cpu=True, generation_kwargs={"min_new_tokens": 4, "num_beams": 2})


@pytest.mark.parametrize("variable", sorted(LAUNCHES))
def test_launches_that_were_never_shown_are_refused(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "true")
    for kind in (RecPOConfig, ContrastiveConfig):
        with pytest.raises(UserError, match=f"This launch asks for {LAUNCHES[variable]}, which is not supported"):
            kind(str(tmp_path), use_cpu=True)
    monkeypatch.setenv(variable, "false")
    check_launch("cpu")
    check_launch("cuda")


def test_devices_that_were_never_tried_are_refused():
    for device in ("mps", "xpu", "npu", "hpu"):
        with pytest.raises(UserError, match=f"The device is '{device}', on which nothing was tried; add `--use_cpu`"):
            check_launch(device)


def test_lora_options_reach_the_adapter(tiny_model, tmp_path):
    """Every LoRA flag stands in the adapter's own settings, which training, evaluation and bundles load alike."""
    given = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
    given |= {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]}
    config = peft_config(PolicyArguments("x", **given))
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    saved = peft.PeftConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.lora_alpha, saved.lora_dropout) == (3, 7, 0.25)
    assert saved.use_rslora and saved.use_dora
    assert (set(saved.target_modules), saved.modules_to_save) == ({"q_proj"}, ["lm_head"])
    experts = PolicyArguments("x", lora_target_modules=None, lora_target_parameters=["mlp.experts.gate_up_proj"])
    assert peft_config(experts).target_parameters == ["mlp.experts.gate_up_proj"]
    assert peft_config(PolicyArguments("x", use_peft=False)) is None
