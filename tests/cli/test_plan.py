"""`--plan`: its formulas against counted parameters, saved tensors and real runs."""

import io
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    MambaConfig,
    Phi3Config,
    Qwen2Config,
)

from r2ec_trl.cli.memory import Precision, Workload, layer_activations, memory_plan, model_shape, optimizer_steps
from r2ec_trl.cli.plan import ROOM, _memory_problems, _precision, installed_versions, make_plan, version_problems
from r2ec_trl.cli.run_start import RunArguments, rows_to_train
from r2ec_trl.errors import UserError
from r2ec_trl.policy.loading import PolicyArguments
from r2ec_trl.training.recpo_config import RecPOConfig

SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
ROWS, LENGTH = 2, 128


def build(config, lora, attention=None, dtype=torch.bfloat16):
    if attention == "sdpa" and isinstance(config, Gemma2Config) and not Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers keeps Gemma-2 and its soft cap away from sdpa")
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


# ------------------------------------------------------------------------------------------------- settings and steps
@pytest.fixture
def plan_of(tiny_model_folder, shop, tmp_path):
    """`plan_of(family, policy={...}, **settings)` plans a run on the shop."""

    def make(family="llama", policy=None, **settings):
        quick = {"per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True, "temperature": 1.0}
        quick |= {"item_fields": ["title"], "warmup_steps": 0, "report_to": "none", "max_completion_length": 32}
        args = RecPOConfig(str(tmp_path), **{**quick, **settings})
        return make_plan(
            args, PolicyArguments(model_name_or_path=str(tiny_model_folder(family)), **(policy or {})), shop
        )

    return make


def test_the_plan_of_a_sound_run_sees_no_problem_and_counts_its_steps(plan_of, make_trainer):
    """40 users, two a batch: 20 batches an epoch, three epochs, as many as the trainer takes."""
    plan = plan_of(num_train_epochs=3)
    assert plan.problems == []
    assert (plan.steps["users_a_batch"], plan.steps["steps_an_epoch"], plan.steps["steps"]) == (2, 20, 60)
    trainer = make_trainer(max_steps=-1, num_train_epochs=0.1, num_iterations=2)
    trainer.train()
    assert optimizer_steps(40, trainer.args)["steps"] == trainer.state.max_steps == trainer.state.global_step
    text = Console(width=100, record=True, file=io.StringIO())
    text.print(plan.render())
    assert "parameters" in (words := text.export_text()) and "no problem seen" in words and "peak" in words


def test_what_one_process_does_in_a_step(plan_of, chat_tokenizer):
    """8 rows a micro-batch, three of them generated at once for 6 users; a completion may end in a marker of ours."""
    work = plan_of(gradient_accumulation_steps=3).workload
    assert (work.rows, work.generation_rows, work.candidates, work.num_items) == (8, 24, 6, 40)
    assert work.completion_tokens == 32 + len(chat_tokenizer("<answer>", add_special_tokens=False)["input_ids"]) > 32
    assert plan_of(item_gradient="none").workload.candidates == plan_of(item_coef=0.0).workload.candidates == 0


def test_auto_checkpoints_only_what_does_not_fit_without(plan_of, monkeypatch):
    sizes = {"per_device_train_batch_size": 64, "max_completion_length": 400, "steps_per_generation": 1}
    whole, saved = (plan_of(gradient_checkpointing=given, **sizes).memory["peak"] for given in (False, True))
    assert saved < whole
    for room, peak in ((1.01 * whole, whole), (0.99 * whole, saved)):
        monkeypatch.setattr("r2ec_trl.cli.plan._host_bytes", lambda room=room: room / ROOM)
        assert plan_of(**sizes).memory["peak"] == peak


@pytest.mark.parametrize(
    ("words", "case"),
    [
        ("--attn_implementation eager", {"family": "gemma2"}),
        ("lower --max_prompt_length or --max_completion_length", {"max_completion_length": 2048}),
        ("fills no batch of 200 users", {"per_device_train_batch_size": 800}),
        ("All 3 steps are warm-up", {"warmup_steps": 32, "max_steps": 3}),
        ("All 3 steps are warm-up", {"warmup_steps": 3, "max_steps": 3}),
        ("rambles at --temperature 1.5", {"temperature": 1.5}),
        ("a crash costs the whole run", {"save_strategy": "no"}),
        ("keeps no optimizer", {"save_only_model": True}),
        ("4-bit weights cannot be trained", {"policy": {"load_in_4bit": True, "use_peft": False}}),
    ],
)
def test_each_problem_is_one_sentence_with_the_knob(plan_of, words, case):
    if "attn_implementation" in words and not Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers never runs Gemma-2 under sdpa")
    assert [sentence for sentence in plan_of(**case).problems if words in sentence]


def test_the_launchers_zero_stage_is_counted(tmp_path):
    """`accelerate launch` with a DeepSpeed config names it in the plugin alone."""
    args = RecPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    assert _precision(args, PolicyArguments("x"), None, None).zero_stage == 0
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    assert _precision(args, PolicyArguments("x"), None, None).zero_stage == 3


def test_who_writes_the_rollouts_and_who_holds_the_table_is_counted(tmp_path):
    """A server's rollouts take nothing here; an engine on the same GPU takes its share of it, awake or asleep."""
    args = RecPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, slice_table=True)
    args.deepspeed_plugin = None

    def found(device_bytes=1000.0, **settings):
        for name, value in settings.items():
            setattr(args, name, value)
        one = _precision(args, PolicyArguments("x"), None, device_bytes)
        return one.own_rollouts, one.vllm_bytes, one.vllm_sleeps, one.table_slices

    assert found() == (True, 0.0, False, args.world_size)
    assert found(use_vllm=True, vllm_mode="server") == (False, 0.0, False, args.world_size)
    assert found(vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_enable_sleep_mode=True)[:3] == (
        *(False, 300.0, True),
    )
    assert found(slice_table=False)[3] == 1


def test_a_model_that_does_not_fit_names_the_largest_phase(plan_of):
    plan = plan_of()
    assert plan.device_bytes is None
    plan.device_bytes = 2.0**20
    precision = Precision(4, None, True, True, "sgd")
    sentences = _memory_problems(plan, precision)
    assert "leaves too little" in sentences[0] and "lower --" in sentences[0]
    assert "--dtype bfloat16 halves it" in sentences[1]


def test_versions_outside_the_tested_ranges_are_named():
    versions = {"torch": "2.13.0", "trl": "1.17.0", "transformers": "5.17.0", "deepspeed": "-"}
    ranges = [
        "torch<2.14,>=2.11",
        "trl<1.17,>=1.16",
        "transformers<5.18,>=5.17",
        'deepspeed>=0.19; extra == "deepspeed"',
    ]
    (sentence,) = version_problems(versions, ranges)
    assert sentence.startswith("trl 1.17.0 is outside <1.17,>=1.16")
    assert installed_versions()["trl"].startswith("1.16")


def test_the_recipe_plans_without_loading_the_model(
    shop, tiny_model_folder, shop_folder, tmp_path, monkeypatch, capsys
):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "recpo.py"))
    monkeypatch.setitem(recipe["main"].__globals__, "load_policy", None)
    words = ["--model_name_or_path", str(tiny_model_folder("llama")), "--dataset", str(shop_folder), "--plan", "true"]
    monkeypatch.setattr("sys.argv", ["recpo.py", *words, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    monkeypatch.setattr("sys.argv", [*sys.argv, "--user_share", "0:0.5"])
    recipe["main"]()
    text = capsys.readouterr().out
    assert "memory of one process" in text
    rows = len(rows_to_train(RunArguments(user_share="0:0.5"), None, shop))
    assert int(re.search(r"batches an epoch\D+(\d+)", text)[1]) == rows // 12 < 40 // 12  # users a batch
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_benchmark_of_a_step_runs_on_a_cpu(capsys, monkeypatch):
    recipes = Path(__file__).parents[2] / "recipes"
    monkeypatch.syspath_prepend(str(recipes))
    step = runpy.run_path(str(recipes / "benchmarks" / "whole_step.py"))
    args = step["StepArguments"](
        shape="toy", use_cpu=True, users=2, prompt_tokens=60, completion_tokens=8, num_items=20, steps=2
    )
    result = step["measure"](args, PolicyArguments())
    assert len(result["step_seconds"]) == 2 and result["mean_completion"] == [8.0, 8.0]
    assert result["plan_gib"]["peak"] > 0 and result["peak_gib"] is None
    assert set(result["seconds_by_part"][0]) == {"generate", "sync", "score", "items", "train"}
    with pytest.raises(UserError, match="do not split"):
        step["measure"](step["StepArguments"](shape="toy", users=2, micro_batch=3), PolicyArguments())


@pytest.mark.parametrize(
    "config, words",
    [
        (
            Phi3Config(hidden_size=32, intermediate_size=64, num_attention_heads=2, pad_token_id=0),
            "no q_proj, k_proj, v",
        ),
        (GPT2Config(n_embd=32, n_head=2), "GPT2LMHeadModel has no q_proj.*LoRA goes on c_attn, c_fc, c_proj"),
        (BloomConfig(hidden_size=32, n_head=2), "LoRA goes on dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
        (MambaConfig(hidden_size=32), "LoRA goes on in_proj"),
    ],
)
def test_the_plan_says_where_lora_goes(config, words, tmp_path, shop, chat_tokenizer):
    config.num_hidden_layers, config.vocab_size = 2, len(chat_tokenizer)
    config.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    args = RecPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    plan = make_plan(args, PolicyArguments(str(tmp_path)), shop)
    assert plan.shape.adapter > 0 and [one for one in plan.problems if re.search(words, one)]


@pytest.mark.parametrize(
    "targets, layers",
    [(["q_proj"], 1), (["q_proj", "layers.0.self_attn.v_proj"], 1.5), ([r".*\.(q|v)_proj"], 2)],
)
def test_the_plan_counts_the_adapter_that_is_trained(plan_of, targets, layers):
    """Of two layers: r 4 times the 64 + 64 sides of q_proj, or the 64 + 32 of v_proj. One name is no expression."""
    sides = {1: 128, 1.5: 128 + 96 / 2, 2: 128 + 96}
    assert plan_of(policy={"lora_target_modules": targets}).shape.adapter == 2 * 4 * sides[layers]
