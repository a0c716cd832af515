"""One name for what releases of transformers call differently."""

import inspect
import warnings

import pytest
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, TrainingArguments

from r2ec_trl.policy.releases import cache_name, is_checkpointing, set_checkpointing
from r2ec_trl.training.recpo_config import RecPOConfig


def test_a_model_takes_its_cache_by_the_name_that_is_found(tiny_model):
    class Older:
        def forward(self, input_ids, past_key_values=None):
            return input_ids

    class Newer:
        def forward(self, input_ids, cache=None):
            return input_ids

    assert (cache_name(Older()), cache_name(Newer())) == ("past_key_values", "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a deprecated name would warn
        model = tiny_model("llama")
        assert not is_checkpointing(model)
        model(input_ids=model.dummy_inputs["input_ids"], **{cache_name(model): None})


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (PreTrainedModel, "_is_stateful", None),
        (LlamaForCausalLM, "_supports_default_dynamic_cache", []),
        (LlamaForCausalLM, "_prepare_generation_config", ["generation_config"]),
        (GenerationConfig, "_get_default_generation_params", []),
        (PreTrainedConfig, "_attn_implementation", None),
    ],
)
def test_private_names_that_decoding_relies_on(owner, name, parameters):
    assert hasattr(owner, name), f"transformers dropped {owner.__name__}.{name}: see policy/decoding.py."
    if parameters is not None:
        theirs = inspect.signature(getattr(owner, name)).parameters.values()
        needed = [each.name for each in theirs if each.name != "self" and each.kind != each.VAR_KEYWORD]
        assert needed == parameters, f"transformers changed {owner.__name__}.{name}: see policy/decoding.py."


def test_checkpointing_is_set_under_every_name(tmp_path):
    """transformers' Trainer reads the newer name where there is one; TRL 1.16 the older."""
    args = RecPOConfig(str(tmp_path), use_cpu=True)
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
    assert len(names) == 1 + ("activation_checkpointing" in TrainingArguments.__dataclass_fields__)
    for value in (True, False):
        set_checkpointing(args, value)
        assert {getattr(args, name) for name in names} == {value}
    args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    set_checkpointing(args, True)
    assert {str(getattr(args, f"{name}_kwargs")) for name in names} == {"{'use_reentrant': True}"}
    for name in names:
        given = RecPOConfig(str(tmp_path), use_cpu=True, **{name: True})
        assert {getattr(given, one) for one in names} == {True}


def test_layers_are_recomputed_as_was_settled(make_trainer):
    for value in (True, False):
        trainer = make_trainer(gradient_checkpointing=value, max_steps=1)
        trainer.train()
        assert is_checkpointing(trainer.model.get_base_model()) is value
