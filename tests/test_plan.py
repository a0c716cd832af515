"""`--plan`: its formulas against counted parameters, saved tensors and real runs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from r2ec_trl.plan import Precision, Workload, layer_activations, memory_plan, model_shape

SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ROWS, LENGTH = 2, 128


def build(config, lora, attention="sdpa", dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    return model


def saved_bytes(model, autocast):
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(tensor):
        # casts of weights have a weight's shape; what is counted has a token dimension
        if tensor.untyped_storage().data_ptr() not in weights and tensor.numel() >= ROWS * LENGTH:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.randint(5, 200, (ROWS, LENGTH))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0  # padding, or no mask is built
    saving = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with saving, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", [Qwen2Config, Gemma2Config])
@pytest.mark.parametrize(
    ("lora", "attention", "dtype"),
    [
        (True, "sdpa", torch.bfloat16),
        (True, "eager", torch.bfloat16),
        (False, "sdpa", torch.bfloat16),
        (True, "sdpa", torch.float32),
    ],
)
def test_activations_of_a_layer_as_autograd_keeps_them(family, lora, attention, dtype):
    """Saved bytes of a model of three layers less those of one, a layer and token, within 15 % of the formula."""
    half = dtype == torch.bfloat16
    saved = [
        saved_bytes(build(family(**SIZES, num_hidden_layers=layers), lora, attention, dtype), half)
        for layers in (1, 3)
    ]
    adapter = {"lora_rank": 4, "lora_modules": "all-linear"} if lora else {}
    shape = model_shape(family(**SIZES, num_hidden_layers=3), attention, **adapter)
    precision = Precision(2 if half else 4, None, half, checkpointing=False, optimizer="sgd")
    expected = layer_activations(shape, precision, LENGTH)
    assert (saved[1] - saved[0]) / (2 * ROWS * LENGTH) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("family", [Qwen2Config, Gemma2Config])
def test_parameters_are_counted_without_a_model(family):
    config = family(**SIZES, num_hidden_layers=2)
    model = build(config, lora=True)
    shape = model_shape(config, lora_rank=4, lora_modules="all-linear")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.adapter == trained
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) - trained
    assert (shape.layers, shape.heads, shape.head_dim, shape.key_value_heads) == (2, 8, 32, 2)
    assert shape.norms == (2 if family is Qwen2Config else 4)


def test_memory_by_hand():
    """
    Qwen2.5-3B has 3,085,938,688 parameters, 2,774,532,096 of them in linear layers: 5.75 GiB in bf16; in NF4
    2,774,532,096 x .5625 + 311,406,592 x 2 = 2.03 GiB. A table of 10,000 items of 2048 dimensions is 78 MiB.
    """
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    shape = model_shape(config, lora_rank=4, lora_modules="all-linear")
    workload = Workload(
        500, 512, 64, rows=4, generation_rows=24, candidates=6, num_items=10_000, forward_tokens=16_384
    )
    bf16 = memory_plan(shape, workload, Precision(2, None, True, True, "paged_adamw_8bit"))
    nf4 = memory_plan(shape, workload, Precision(2, "nf4", True, True, "paged_adamw_8bit"))
    assert (shape.parameters, shape.linear) == (3_085_938_688, 2_774_532_096)
    assert bf16["weights"] / 2**30 == pytest.approx(5.748, abs=1e-3)
    assert nf4["weights"] / 2**30 == pytest.approx(2.034, abs=1e-3)
    assert bf16["table"] == 10_000 * 2048 * 4
    # 36 layers x 2 (keys and values) x 2 heads x 128 x 2 bytes x 24 rollouts x 1012 tokens
    assert bf16["generate"] > 36 * 2 * 2 * 128 * 2 * 24 * 1012
    shared = memory_plan(shape, workload, Precision(2, None, True, True, "paged_adamw_8bit", 4, zero_stage=3))
    assert shared["weights"] == pytest.approx(bf16["weights"] / 4)
    assert bf16["peak"] < memory_plan(shape, workload, Precision(2, None, True, False, "sgd"))["peak"]
