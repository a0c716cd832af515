"""What is asked of a model at the start: the right answer, or one sentence."""

import contextlib
import copy
import json
import logging
import shutil

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from r2ec_trl.errors import UserError
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.batching import check_length, positions_of
from r2ec_trl.policy.checks import (
    PROJECTIONS,
    check_no_hub_code,
    check_policy,
    check_start,
    fit_adapter,
    fit_targets,
    switch_dropout_off,
)
from r2ec_trl.policy.loading import PolicyArguments, load_policy, peft_config
from r2ec_trl.policy.prompts import PromptConfig, Prompts

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
PHI3 = {**TINY, "intermediate_size": 64, "original_max_position_embeddings": 2048, "pad_token_id": 0}


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """`folder(config={...}, weights=function)` is a tiny Llama on disk with something changed."""

    def make(config=None, weights=None):
        path = shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**settings, **(config or {})}))
        if weights is not None:
            save_file(weights(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
        return path

    return make


def load(path, **settings):
    return load_policy(PolicyArguments(model_name_or_path=str(path), **settings))


# ------------------------------------------------------------------------------------------ LoRA
def opt():
    return tf.AutoModelForCausalLM.from_config(tf.OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32))


def test_default_targets_become_those_of_the_architecture_and_are_named(caplog):
    phi3 = tf.AutoModelForCausalLM.from_config(tf.Phi3Config(**PHI3))
    with caplog.at_level(logging.WARNING):
        config = fit_adapter(peft_config(PolicyArguments("x")), phi3)
    assert set(config.target_modules) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert "has no q_proj, k_proj, v_proj, gate_proj, up_proj: LoRA goes on" in caplog.text
    assert fit_targets(None, opt())[0] == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]


def test_targets_that_are_there_stay_and_nothing_is_said(tiny_model, caplog):
    config = peft_config(PolicyArguments("x"))
    assert set(fit_adapter(config, tiny_model("llama")).target_modules) == set(PROJECTIONS) and not caplog.text


def test_named_targets_are_told_apart(caplog):
    with pytest.raises(UserError, match="`lora_target_modules`: c_attn, w1 match no module of OPTForCausalLM, which"):
        fit_targets(["c_attn", "w1"], opt())
    targets, sentence = fit_targets(["q_proj", "w1"], opt())
    assert targets == ["q_proj", "w1"] and "w1 match no module of OPTForCausalLM" in sentence
    assert fit_targets("all-linear", opt()) == ("all-linear", None)
    with pytest.raises(UserError, match="'w.*x' matches no module"):
        fit_targets("w.*x", opt())
    with pytest.raises(UserError, match="'.*_proj' is no regular expression .nothing to repeat"):
        fit_targets("*_proj", opt())


def test_target_parameters_reach_the_adapter():
    """LoRA on the experts of a mixture, as TRL's own configuration has it."""
    names = ["mlp.experts.gate_up_proj"]
    config = peft_config(PolicyArguments("x", lora_target_modules=None, lora_target_parameters=names))
    assert config.target_parameters == names and config.lora_dropout == 0
    mixtral = tf.MixtralConfig(**TINY, intermediate_size=64, num_key_value_heads=1, num_local_experts=2)
    model = tf.AutoModelForCausalLM.from_config(mixtral)
    model = peft.get_peft_model(model, fit_adapter(config, model))
    assert [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    with pytest.raises(UserError, match="has no parameter 'mlp.none'"):
        fit_adapter(peft_config(PolicyArguments("x", lora_target_parameters=["mlp.none"])), model)


# ------------------------------------------------------------------------------------- positions
def test_positions():
    assert positions_of(tf.GPT2Config(n_positions=64)) == 64
    assert positions_of(tf.MptConfig(max_seq_len=99)) == 99
    assert positions_of(tf.BloomConfig()) is None and positions_of(tf.MambaConfig()) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    assert positions_of(tf.Qwen2Config(max_position_embeddings=100, rope_parameters=yarn)) == 400
    check_length(tf.GPT2Config(n_positions=64), 64, "x", "y")
    with pytest.raises(UserError, match="They take up to 65 tokens, but the model has 64 positions; lower `y`"):
        check_length(tf.GPT2Config(n_positions=64), 65, "They", "`y`")


def test_prompts_beyond_the_positions_are_refused_at_the_start(make_trainer, tiny_model):
    with pytest.raises(UserError, match="A user prompt and its reasoning take up to .*`max_completion_length`"):
        make_trainer(model=tiny_model("llama", max_position_embeddings=100), peft=False, max_completion_length=90)
    with pytest.raises(UserError, match="Item prompts take up to .*`max_item_length`"):
        words = "a long text " * 50 + "{fields}"
        make_trainer(model=tiny_model("llama", max_position_embeddings=400), peft=False, item_template=words)


# --------------------------------------------------------------------------------------- dropout
def test_functional_dropout_is_off_and_measured(make_trainer, chat_tokenizer, monkeypatch):
    """At learning rate 0 the second iteration's ratio is 1: OPT drops out by a function, which TRL leaves on."""
    ids = {"eos_token_id": chat_tokenizer.eos_token_id, "pad_token_id": chat_tokenizer.pad_token_id}
    config = tf.OPTConfig(**{**TINY, "vocab_size": len(chat_tokenizer)}, ffn_dim=64, word_embed_proj_dim=32, **ids)

    def train():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float()
        trainer = make_trainer(model=model, peft=False, learning_rate=0.0, num_iterations=2, item_credit="all")
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    config.dropout = 0.1
    logs = train()
    assert [row["clip_ratio/region_mean"] for row in logs] == [0, 0] == [row["item/clip_ratio"] for row in logs]
    config.dropout = 0.1
    monkeypatch.setattr("r2ec_trl.training.recpo_trainer.switch_dropout_off", lambda model: None)
    with pytest.raises(UserError, match="OPTForCausalLM keeps some dropout or noise while it trains"):
        train()


def test_every_number_of_dropout_is_zero():
    model = tf.AutoModelForCausalLM.from_config(tf.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=99))
    switch_dropout_off(model)
    left = {name: value for module in model.modules() for name, value in vars(module).items() if "drop" in name}
    assert not any(value for value in left.values() if isinstance(value, float))
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert model.config.attn_pdrop == model.config.resid_pdrop == 0


# --------------------------------------------------------------------------------- what is loaded
@pytest.mark.parametrize(
    "config, words",
    [
        ({"attn_implementation": "someone/kernel"}, "'someone/kernel' of the hub, which is code"),
        ({"_attn_implementation": "someone/kernel"}, "'someone/kernel' of the hub, which is code"),
        ({"text_config": {"attn_implementation": "paged|a/b"}}, "'paged|a/b' of the hub"),
        ({"hidden_size": 96}, "cannot be loaded|lacks"),
        ({"num_hidden_layers": 3}, r"lacks 9 weights .* such as model\.layers\.2"),
        ({"model_type": "nosuch"}, "cannot be loaded"),
        ({"num_attention_heads": "two"}, "cannot be loaded"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(folder, config, words):
    with pytest.raises(UserError, match=words) as caught:
        load(folder(config=config))
    assert "\n" not in str(caught.value)


def test_a_kernel_is_for_those_who_trust_it():
    check_no_hub_code({"attn_implementation": "someone/kernel"}, None, trust_remote_code=True)
    check_no_hub_code({"_name_or_path": "org/model", "attn_implementation": "sdpa"}, "eager", False)
    with pytest.raises(UserError, match="'kernels-community/flash-attn3'"):
        check_no_hub_code({}, "kernels-community/flash-attn3", False)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load(path)
    damaged = folder()
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(damaged)


def test_a_pickled_base_is_refused(folder):
    """Only safetensors are read: a .bin runs code when it is opened."""
    path = folder()
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded: .*safetensors"):
        load(path)


def test_damaged_weights_are_seen_before_training(folder, make_trainer):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")
        return tensors

    model, _ = load(folder(weights=spoil))
    with pytest.raises(UserError, match="states of LlamaForCausalLM are not finite"):
        make_trainer(model=model)


def test_code_of_a_model_runs_only_when_it_is_asked_for(folder, tmp_path, shop, chat_tokenizer):
    """Nothing trusts by default: load_policy, a bundle, and the trainer that is given a name."""
    from r2ec_trl.bundle.bundle import Bundle
    from r2ec_trl.training.recpo_config import RecPOConfig
    from r2ec_trl.training.recpo_trainer import RecPOTrainer

    auto = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}
    path = folder(config={"model_type": "mine", "auto_map": auto})
    ran = tmp_path / "ran"
    (path / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    args = RecPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    for use in (
        lambda: load(path),
        lambda: RecPOTrainer(str(path), shop["items"], None, args, shop["train"]),
        lambda: Bundle.load(path),
    ):
        with pytest.raises(UserError):
            use()
        assert not ran.exists()
    with pytest.raises(UserError):
        load_policy(PolicyArguments(str(path)), trust_remote_code=True)
    assert ran.exists()


def test_a_bundle_trusts_no_code_by_default(written, monkeypatch):
    """What `Bundle.load` hands on, and what every recipe's flag says, is False unless it is asked for."""
    from r2ec_trl.bundle import format as bundle_format
    from r2ec_trl.bundle.bundle import Bundle
    from r2ec_trl.cli.bundle_choice import BundleArguments
    from r2ec_trl.training.contrastive_trainer import ContrastiveConfig

    asked = []
    inner = bundle_format.load_policy
    monkeypatch.setattr(
        bundle_format,
        "load_policy",
        lambda *args, **more: asked.append(more["trust_remote_code"]) or inner(*args, **more),
    )
    Bundle.load(written)
    assert asked == [False]
    assert not BundleArguments.trust_remote_code and not ContrastiveConfig.trust_remote_code


def test_a_damaged_head_is_seen_before_training(tiny_model, make_trainer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(UserError, match="token scores of LlamaForCausalLM hold NaN; its LM head"):
        make_trainer(model=model)


def test_a_tokenizer_with_more_words_than_the_model_is_refused_at_the_start(tiny_model, make_trainer, chat_tokenizer):
    """The word stands in titles, so the first short prompt does not show it."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_tokens(["guitar strings"])
    known = len(chat_tokenizer)
    with pytest.raises(UserError, match=f"writes 'guitar strings' as token {known}, but the model knows {known}; "):
        make_trainer(model=tiny_model("llama"), tokenizer=tokenizer)


def test_a_model_that_sees_what_comes_after_is_no_policy(chat_tokenizer, shop):
    """An encoder, which transformers loads as a language model: its log-probabilities would know the next token."""
    config = {**TINY, "intermediate_size": 64, "initializer_range": 0.2}
    prompts = Prompts(chat_tokenizer, PromptConfig(), shop["items"])
    for is_decoder in (True, False):
        model = tf.AutoModelForCausalLM.from_config(tf.BertConfig(is_decoder=is_decoder, **config)).eval()
        add_answer_state(model)
        check_policy(model, prompts, generates=False)
        with (
            contextlib.nullcontext() if is_decoder else pytest.raises(UserError, match="BertLMHeadModel sees the tok")
        ):
            check_policy(model, prompts, generates=True)


@pytest.mark.parametrize("training", [True, False])
def test_a_check_leaves_the_model_in_its_mode(tiny_model, chat_tokenizer, shop, training):
    model = tiny_model("llama").train(training)
    add_answer_state(model)
    for trains in (True, False):
        check_policy(model, Prompts(chat_tokenizer, PromptConfig(), shop["items"]), generates=True, trains=trains)
        assert model.training == training


def test_positions_hold_the_prompt_the_reasoning_and_the_marker(tiny_model, chat_tokenizer, shop):
    prompts = Prompts(chat_tokenizer, PromptConfig(), shop["items"])
    needed = len(prompts.user_ids(shop["test"][0])) + 5 + len(prompts.marker_ids)
    for positions, fits in ((needed, True), (needed - 1, False)):
        model = tiny_model("llama", max_position_embeddings=positions)
        add_answer_state(model)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="A user prompt and its reasoning"):
            check_start(model, prompts, [[4]], completion=5)


def test_a_marker_that_the_tokenizer_cannot_write_is_refused(tiny_model, chat_tokenizer, shop):
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", chat_template=chat_tokenizer.chat_template
    )
    prompts = Prompts(tokenizer, PromptConfig(), shop["items"])
    with pytest.raises(UserError, match="cannot write the `marker` '<answer>' .it reads back as '<unk>"):
        check_start(tiny_model("llama"), prompts, [[1]], completion=5)
