"""
What RecPO relies on inside TRL 1.16. A red test here means that TRL changed under us: read the class docstring of
RecPOTrainer, mend the override that the message names, then move the version range in setup.cfg.
"""

import dataclasses
import inspect
import re

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_trainer import shuffle_sequence_dict, split_tensor_dict
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from r2ec_trl.policy.answer_state import AnswerStateOutput, add_answer_state
from r2ec_trl.training.recpo_trainer import RecPOTrainer

OVERRIDDEN = {
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_compute_loss": ["model", "inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save_checkpoint": ["model", "trial"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
}
CALLED = {  # private methods that are called, not overridden
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_get_output_dir": ["trial"],
}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_methods_have_the_parameters_we_pass_on(name):
    """Relies on each method of `OVERRIDDEN` and `CALLED`."""
    theirs = [p for p in inspect.signature(getattr(GRPOTrainer, name)).parameters if p != "self"]
    assert theirs == {**OVERRIDDEN, **CALLED}[name], f"TRL changed GRPOTrainer.{name}: {theirs}; RecPOTrainer uses it."


def test_the_loss_calls_the_model_once_and_by_keyword():
    """
    Relies on `GRPOTrainer._compute_loss` and `GRPOTrainer._get_per_token_logps_and_entropies`: RecPOTrainer hands a
    closure in the model's place to keep the answer states of that forward.
    """
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1
    assert len(re.findall(r"\bmodel\b(?=[,)(])", source)) == 2, "TRL's loss uses `model` elsewhere too."
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in source


def test_rollout_func_is_given_prompts_and_its_fields_reach_the_rewards():
    """
    Relies on `GRPOTrainer._generate`, `._generate_and_score_completions` and `._calculate_rewards`: `roll_out` returns
    `env_mask`, and what `OF_ROLL_OUT` names for the rewards.
    """
    source = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in source
    assert 'required_keys = {"prompt_ids", "completion_ids", "logprobs"}' in source
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in source
    assert source.index("self.vllm_generation.sync_weights()") < source.index("self.rollout_func(prompts, self)")
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    fields = source.index("inp[key] = values[i]")
    assert fields < source.index("self._calculate_rewards(inputs, prompts, completions, completion_ids_list)")


def test_the_warning_that_rollout_func_is_experimental_is_silenced(make_trainer, recwarn):
    """Relies on the wording in `GRPOTrainer.__init__`."""
    assert "You are using 'rollout_func'" in inspect.getsource(GRPOTrainer.__init__)
    make_trainer()
    assert not [warning for warning in recwarn if "rollout_func" in str(warning.message)]


def test_at_most_eight_overrides_each_with_its_reason_in_the_docstring():
    """Relies on each method of `OVERRIDDEN`: all that the class, or a mixin, takes over from TRL or transformers."""
    ours = {
        name
        for base in RecPOTrainer.__mro__[: RecPOTrainer.__mro__.index(GRPOTrainer)]
        for name in vars(base)
        if hasattr(GRPOTrainer, name) and not name.startswith("__")
    } - {"_tag_names", "_name", "_paper"}
    assert ours == set(OVERRIDDEN) and len(ours) <= 8
    missing = [name for name in ours if f"`{name}`" not in RecPOTrainer.__doc__]
    assert not missing, f"RecPOTrainer's docstring does not give the reason for {missing}."


def test_fused_output_has_the_fields_that_ours_extends():
    """Relies on `trl.trainer.utils.FusedCausalLMOutput`."""
    theirs = [field.name for field in dataclasses.fields(FusedCausalLMOutput)]
    assert theirs == [
        "loss",
        "log_probs",
        "entropy",
        "log_sum_sq_probs",
        "mean_logits",
        "is_top1",
        "label_mask",
        "aux_loss",
    ], f"TRL changed FusedCausalLMOutput: {theirs}; AnswerStateOutput extends it."
    assert [field.name for field in dataclasses.fields(AnswerStateOutput)] == [*theirs, "answer_state"]


def test_the_second_patch_hands_out_states_beside_trls_log_probs(tiny_model):
    """Relies on `trl.trainer.utils.add_fused_lm_head`."""
    model, plain = tiny_model("qwen2"), tiny_model("qwen2")
    for each in (model, plain):
        add_fused_lm_head(each, outputs=("log_probs", "entropy"))
    add_answer_state(model)
    add_answer_state(model)  # a second call does nothing
    ids = torch.randint(4, 300, (2, 9))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    ours, theirs = model(**call), plain(**call)
    assert torch.equal(ours.log_probs, theirs.log_probs) and torch.equal(ours.entropy, theirs.entropy)
    hidden = plain.model(input_ids=ids).last_hidden_state[:, -1]
    assert torch.allclose(ours.answer_state, hidden, atol=1e-6)
    assert list(inspect.signature(model.forward).parameters) == list(inspect.signature(plain.forward).parameters)
    leaves, spec = torch.utils._pytree.tree_flatten(ours)  # accelerate's fp32 conversion and DDP rebuild the output
    assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).answer_state, ours.answer_state)


def test_batches_are_shuffled_and_split_with_0d_tensors_whole():
    """Relies on `trl.trainer.grpo_trainer.shuffle_sequence_dict` and `.split_tensor_dict`."""
    batch = {"rows": torch.arange(6), "count": torch.tensor(7), "wide": torch.arange(12).view(6, 2)}
    torch.manual_seed(0)
    shuffled = shuffle_sequence_dict(batch)
    assert shuffled["count"].item() == 7 and sorted(shuffled["rows"].tolist()) == list(range(6))
    assert shuffled["wide"][:, 0].tolist() == (2 * shuffled["rows"]).tolist(), "columns must move together"
    parts = split_tensor_dict(shuffled, 3)
    assert [part["count"].item() for part in parts] == [7, 7, 7]
    assert torch.cat([part["rows"] for part in parts]).tolist() == shuffled["rows"].tolist()


def test_what_generate_returns_and_logs(make_trainer, chat_tokenizer, replay):
    """
    Relies on `GRPOTrainer._generate` and `._metrics`: `prompt_ids, completion_ids, tool_mask, completions, logprobs,
    *rest`, and the figures that we set right.
    """
    replay(lambda prompt_ids, number: [50, 60 + number])
    trainer = make_trainer()
    trainer.model.train()
    prompts = [[{"role": "user", "content": "guitar"}]] * 4
    prompt_ids, completion_ids, tool_mask, completions, logprobs, extra, *_ = GRPOTrainer._generate(trainer, prompts)
    assert prompt_ids[0] == chat_tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True)["input_ids"]
    marker = trainer.reader.marker_ids
    assert completion_ids == [[50, 60 + number, *marker] for number in range(4)]
    assert tool_mask == [[1, 1] + [0] * len(marker)] * 4 and logprobs is None
    assert set(extra) == {"_rollout", "_prompt_ids"} and completions[0][0]["role"] == "assistant"
    lengths = [f"{which}_{what}" for which in ("mean", "min", "max") for what in ("length", "terminated_length")]
    for name in ["clipped_ratio", *lengths]:
        values = trainer._metrics["train"][f"completions/{name}"]
        assert len(values) == 1, f"TRL no longer logs completions/{name}, which Telemetry.rollouts sets right."


def test_keys_of_the_batch(make_trainer, replay):
    """Relies on what `GRPOTrainer._generate_and_score_completions` returns."""
    replay(lambda prompt_ids, number: [50, 60 + number])
    trainer = make_trainer()
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    theirs = {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "tool_mask",
    }
    assert set(batch) == theirs | {"item_weights", "item_positions", "group", "quiet"}
    assert batch["num_items_in_batch"].ndim == 0 and batch["advantages"].shape == (8,)
    assert batch["tool_mask"].shape == batch["completion_mask"].shape
    assert (
        batch["num_items_in_batch"] == (batch["tool_mask"] * batch["completion_mask"]).sum()
    ), "TRL's loss must count trained tokens alone: the appended marker is masked by tool_mask"
    assert (batch["prompt_mask"][:, -1] == 1).all() and (batch["completion_mask"][:, 0] == 1).all()


def test_attributes_that_we_read(make_trainer):
    """Relies on `GRPOTrainer._metrics`, `._step`, `._tokenizer`, and `unwrap_model_for_generation`."""
    trainer = make_trainer()
    for name in (
        "_metrics",
        "_step",
        "_tokenizer",
        "accelerator",
        "epsilon_high",
        "epsilon_low",
        "eos_token_ids",
        "generation_config",
        "mask_truncated_completions",
        "model_wrapped",
        "num_generations",
        "num_iterations",
        "use_transformers_continuous_batching",
        "use_vllm",
    ):
        assert hasattr(trainer, name), f"GRPOTrainer.{name} is gone; RecPOTrainer reads it."
    assert trainer._step == 0 and trainer.epsilon_high == trainer.epsilon_low == 0.2
    assert "gather_deepspeed3_params" in inspect.signature(unwrap_model_for_generation).parameters
    for name in ("ds3_gather_for_generation", "steps_per_generation", "generation_batch_size"):
        assert hasattr(trainer.args, name), f"GRPOConfig.{name} is gone."


def test_prompts_are_rendered_by_the_template_that_we_hand_in():
    """Relies on `GRPOTrainer._tokenize_prompts`: RecPOTrainer sets `chat_template`, where the clock is pinned."""
    source = inspect.getsource(GRPOTrainer._tokenize_prompts)
    assert source.count("chat_template=self.chat_template,") == source.count(".apply_chat_template(") > 0
    assert source.count("**self.chat_template_kwargs,") == source.count(".apply_chat_template(")


def test_the_engine_calls_what_ours_overrides():
    """Relies on `VLLMGeneration._init_vllm`, `._iter_named_params`, `._fix_param_name_to_vllm` and `._dist`."""
    for name in ("_init_vllm", "_iter_named_params", "sync_weights"):
        assert list(inspect.signature(getattr(VLLMGeneration, name)).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration._fix_param_name_to_vllm).parameters)[:2] == ["self", "name"]
    source = inspect.getsource(VLLMGeneration)
    assert "self._init_vllm()" in source and "self._dist = DistributedBackend(accelerator)" in source
    assert "in self._iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)
    assert "self.llm = LLM(" in source, "vllm.sync replaces `LLM` there"
    assert "VLLMGeneration(" in inspect.getsource(GRPOTrainer), "vllm.sync replaces `VLLMGeneration` there"


def test_old_log_probs_are_kept_under_the_condition_that_ours_repeats():
    """Relies on `GRPOTrainer._generate_and_score_completions`."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
    assert "if self.args.gradient_accumulation_steps % generate_every != 0 or (" in source


def test_dapo_normalises_over_the_generation_batch_as_the_item_term_does():
    """Relies on `GRPOTrainer._compute_loss`."""
    lines = [line.strip() for line in inspect.getsource(GRPOTrainer._compute_loss).splitlines()]
    assert 'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in lines
    assert (
        "normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation" in lines
    )


def test_trl_masks_truncated_rollouts_by_their_last_id_which_is_why_we_take_it_over():
    """Relies on `GRPOTrainer._generate_and_score_completions`."""
    assert "ids[-1] not in eos_and_pad" in inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "mask_truncated_completions" in {field.name for field in dataclasses.fields(GRPOConfig)}


def test_every_contract_says_what_it_relies_on():
    tests = {name: each for name, each in globals().items() if name.startswith("test_") and each.__doc__}
    assert len(tests) == sum(name.startswith("test_") for name in globals()) - 1  # all but this one
    assert not [name for name, test in tests.items() if "Relies on" not in test.__doc__]
