"""Every decoder-only family either has what we need or is refused in one sentence, on tiny random models."""

import peft
import pytest
import torch
import transformers as tf

from r2ec_trl.errors import UserError
from r2ec_trl.policy.answer_state import add_answer_state, encode_states
from r2ec_trl.policy.checks import PROJECTIONS, check_policy, fit_targets, linear_names, switch_dropout_off
from r2ec_trl.policy.loading import PolicyArguments, peft_config
from r2ec_trl.policy.prompts import PromptConfig, Prompts

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_KEY = {**WIDE, "num_key_value_heads": 1}
HEAD = {**ONE_KEY, "head_dim": 16}
WINDOW = {**HEAD, "sliding_window": 16, "query_pre_attn_scalar": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK |= {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 16}
DEEPSEEK |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": (tf.LlamaConfig, HEAD),
    "qwen2": (tf.Qwen2Config, ONE_KEY),
    "qwen3": (tf.Qwen3Config, HEAD),
    "mistral": (tf.MistralConfig, HEAD),
    "gemma": (tf.GemmaConfig, HEAD),
    "gemma2": (tf.Gemma2Config, WINDOW),
    "gemma3": (tf.Gemma3TextConfig, WINDOW),
    "phi": (tf.PhiConfig, {**WIDE, "resid_pdrop": 0.1}),
    "phi3": (tf.Phi3Config, {**ONE_KEY, "original_max_position_embeddings": 2048}),
    "opt": (tf.OPTConfig, {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": (tf.GPT2Config, GPT),
    "gpt_bigcode": (tf.GPTBigCodeConfig, GPT),
    "falcon": (tf.FalconConfig, {**WIDE, "alibi": False}),
    "gpt_neox": (tf.GPTNeoXConfig, WIDE),
    "gptj": (tf.GPTJConfig, {**GPT, "rotary_dim": 8}),
    "bloom": (tf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "mpt": (tf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 2}),
    "stablelm": (tf.StableLmConfig, {**WIDE, "num_key_value_heads": 2}),
    "olmo": (tf.OlmoConfig, WIDE),
    "olmo2": (tf.Olmo2Config, WIDE),
    "cohere": (tf.CohereConfig, ONE_KEY),
    "granite": (tf.GraniteConfig, ONE_KEY),
    "biogpt": (tf.BioGptConfig, WIDE),
    "xglm": (tf.XGLMConfig, {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2}),
    "starcoder2": (tf.Starcoder2Config, ONE_KEY),
    "smollm3": (tf.SmolLM3Config, ONE_KEY),
    "mamba": (tf.MambaConfig, STATES),
    "falcon_mamba": (tf.FalconMambaConfig, STATES),
    "rwkv": (tf.RwkvConfig, {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}),
    "xlstm": (tf.xLSTMConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}),
    "deepseek_v3": (tf.DeepseekV3Config, {**WIDE, "num_key_value_heads": 2, **DEEPSEEK}),
    "mixtral": (tf.MixtralConfig, {**ONE_KEY, "num_local_experts": 4, "router_jitter_noise": 0.1}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {**HEAD, **EXPERTS}),
}
REFUSED = {
    "rwkv": "RwkvForCausalLM does not leave padding out of account",
    "xlstm": "xLSTMForCausalLM cannot read a short prompt .*matC_old has wrong shape",  # its cache, in transformers
}


def build(family, tokenizer):
    config_class, settings = FAMILIES[family]
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    positions = {} if "n_positions" in settings else {"max_position_embeddings": 2048}
    spread = {"init_std" if family == "xglm" else "initializer_range": 0.2}
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), **ids, **positions, **spread, **settings)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    model.config.architectures = [type(model).__name__]
    return model


@pytest.fixture(scope="module")
def prompts(chat_tokenizer, shop):
    short = {"user_template": "Bought:\n{history}\nNext {category}{marker}?", "item_template": "{fields}"}
    return Prompts(chat_tokenizer, PromptConfig(**short), shop["items"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_fit_for_use_or_refused(family, chat_tokenizer, prompts, shop):
    """States in a batch = states alone, padding on either side; no dropout left; LoRA on modules that are there."""
    model = build(family, chat_tokenizer)
    add_answer_state(model)
    targets, sentence = fit_targets(peft_config(PolicyArguments("x")).target_modules, model)
    assert set(targets) == (set(PROJECTIONS) if sentence is None else set(linear_names(model))) and targets
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(targets)))
    switch_dropout_off(model)
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            check_policy(model, prompts, generates=True, trains=True)
        return
    check_policy(model, prompts, generates=True, trains=True)
    sequences = [prompts.user_ids(user) for user in shop["test"]][:3]
    model.train()
    states = encode_states(model, sequences, chat_tokenizer.pad_token_id)
    alone = torch.cat([encode_states(model, [one], chat_tokenizer.pad_token_id) for one in sequences])
    assert (states - alone).abs().max() < 1e-3 * alone.abs().max()
    states.square().sum().backward()
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert adapter and all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_a_step_or_is_refused(family, chat_tokenizer, make_trainer):
    model = build(family, chat_tokenizer)
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            make_trainer(model=model, peft=False)
        return
    trainer = make_trainer(model=model, peft=False, max_steps=1, item_credit="all", gradient_checkpointing=False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
