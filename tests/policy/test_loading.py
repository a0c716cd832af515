"""Loading of base models; adapters are tests/test_adapters.py's."""

from transformers import Gemma2ForCausalLM

from r2ec_trl.policy.loading import PolicyArguments, load_policy


def test_a_soft_cap_of_attention_survives_loading(tiny_model_folder, caplog):
    """sdpa leaves Gemma-2's attention soft cap out: transformers below 5.24 loads it so, without a word."""
    model, _ = load_policy(PolicyArguments(model_name_or_path=str(tiny_model_folder("gemma2"))))
    assert model.config._attn_implementation == "eager"
    assert ("soft cap" in caplog.text) == Gemma2ForCausalLM._supports_sdpa


def test_other_models_keep_their_attention(tiny_model_folder, caplog):
    model, _ = load_policy(PolicyArguments(model_name_or_path=str(tiny_model_folder("llama"))))
    assert model.config._attn_implementation == "sdpa"
    assert "soft cap" not in caplog.text
