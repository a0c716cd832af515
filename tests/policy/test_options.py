"""The table of options names every field of TRL's and transformers' settings, and does what it says."""

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments, peft_config
from r2ec_trl.policy.options import LAUNCHES, NEWER, OBEYED, REFUSED, TRLS, check_launch
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig
from r2ec_trl.training.recpo_config import RecPOConfig

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
    assert not new, f"a release brought {new}: decide in r2ec_trl/policy/options.py what they mean here"
    assert not gone, f"a release dropped {gone}: take them out of r2ec_trl/policy/options.py"


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
