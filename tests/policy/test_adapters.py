"""Adapters with the released ones' layout: written by hand here, so that no PEFT of today has a say in the names."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import evaluate_users, summarise_users
from r2ec_trl.items.encoding import make_encoder, make_table
from r2ec_trl.policy import loading
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.loading import PROJECTIONS, PolicyArguments, load_policy
from r2ec_trl.policy.prompts import PromptConfig, Prompts

RANK, HIDDEN, INNER, HEADS, KEY_HEADS, HEAD = 4, 64, 128, 2, 1, 32  # conftest's tiny Gemma 2
SIDES = {  # projection -> (module, input size, output size)
    "q_proj": ("self_attn", HIDDEN, HEADS * HEAD),
    "k_proj": ("self_attn", HIDDEN, KEY_HEADS * HEAD),
    "v_proj": ("self_attn", HIDDEN, KEY_HEADS * HEAD),
    "o_proj": ("self_attn", HEADS * HEAD, HIDDEN),
    "gate_proj": ("mlp", HIDDEN, INNER),
    "up_proj": ("mlp", HIDDEN, INNER),
    "down_proj": ("mlp", INNER, HIDDEN),
}
PRIVATE_BASE = "/home/someone/models/gemma-2-2b-it"
# The fields that PEFT wrote in the days of transformers 4.48.
CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": PRIVATE_BASE,
    "bias": "none",
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 128,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": list(PROJECTIONS),
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """An adapter folder as the released ones are: read only."""
    folder = tmp_path_factory.mktemp("released") / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name, (module, inputs, outputs) in SIDES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}.{name}"
            a = torch.randn(RANK, inputs, generator=generator) * 0.02
            b = torch.randn(outputs, RANK, generator=generator) * 0.02
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    return folder


@pytest.fixture
def broken(released, tmp_path):
    """`broken(config={...}, tensors=function)` is a copy of the adapter with settings or tensors changed."""

    def make(config=None, tensors=None):
        folder = tmp_path / "broken"
        shutil.copytree(released, folder)
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        if tensors is not None:
            save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder

    return make


def load(adapter, base, **settings):
    return load_policy(PolicyArguments(model_name_or_path=base and str(base), adapter=str(adapter), **settings))


def test_the_named_base_wins_over_the_private_one(released, tiny_model_folder):
    model, _ = load(released, tiny_model_folder("gemma2"))
    with pytest.raises(UserError, match=f"{PRIVATE_BASE}.*--model_name_or_path"):
        load(released, None)
    # bf16 on disk, float32 in memory, every tensor there
    saved = load_file(released / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    assert len(saved) == 2 * 7 * 2 and saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.float())
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_model_folder("gemma2"))


def test_metrics_equal_the_merged_models(released, tiny_model_folder, shop):
    def evaluate(model, tokenizer):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_answer_state(base)
        prompts = Prompts(tokenizer, PromptConfig(max_history_items=5), shop["items"])
        table = make_table(prompts, shop["items"], "cosine", "cpu")
        table.refresh(make_encoder(model, prompts, 4096))
        return evaluate_users(model.eval(), prompts, table, shop["test"], 8, 0.02)

    base = tiny_model_folder("gemma2")
    adapted, tokenizer = load(released, base)
    frame = evaluate(adapted, tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    weights = load_file(released / "adapter_model.safetensors")
    with torch.no_grad():  # merged by hand: W + α/r B A
        for layer, block in enumerate(plain.model.layers):
            for name, (module, _, _) in SIDES.items():
                prefix = f"base_model.model.model.layers.{layer}.{module}.{name}"
                a, b = weights[f"{prefix}.lora_A.weight"].float(), weights[f"{prefix}.lora_B.weight"].float()
                getattr(getattr(block, module), name).weight += 128 / RANK * b @ a
    merged = evaluate(plain, tokenizer)
    exact = ["user_id", "target", "rank", "rank_masked", "reasoning", "top_item_ids"]
    assert frame[exact].equals(merged[exact])
    assert summarise_users(frame) == summarise_users(merged)
    assert (frame["logprob"] - merged["logprob"]).abs().max() < 1e-3
    unadapted = evaluate(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager"),
        tokenizer,
    )
    assert not frame["rank"].equals(unadapted["rank"])  # or the test would show nothing


def test_trains_on(released, tiny_model_folder, make_trainer, caplog):
    args = PolicyArguments(model_name_or_path=str(tiny_model_folder("gemma2")), adapter=str(released))
    model, _ = load_policy(args, trainable=True)
    assert "of a new adapter" not in caplog.text
    load_policy(dataclasses.replace(args, lora_r=9), trainable=True)
    assert f"`lora_r` is of a new adapter: {released} is trained on as it was saved." in caplog.text
    with pytest.raises(UserError, match="`use_peft` false trains all weights, `adapter` those of the adapter"):
        dataclasses.replace(args, use_peft=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model=model, peft=False, max_steps=1)
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert len(changed) == 2 * 7 * 2


def test_a_pickle_is_refused(broken, tiny_model_folder):
    folder = broken()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickles .* are not read"):
        load(folder, tiny_model_folder("gemma2"))


def test_missing_tensors_are_refused(broken, tiny_model_folder):
    def drop(tensors):
        return {key: value for key, value in tensors.items() if "layers.1.mlp" not in key}

    with pytest.raises(UserError, match=r"lacks 6 of the tensors .*layers\.1\.mlp\.down_proj\.lora_A\.weight"):
        load(broken(tensors=drop), tiny_model_folder("gemma2"))


def test_another_naming_of_the_modules_is_refused(broken, tiny_model_folder):
    def rename(tensors):
        return {key.replace("model.model.layers", "model.transformer.h"): value for key, value in tensors.items()}

    with pytest.raises(UserError, match="lacks 28 of the tensors"):
        load(broken(tensors=rename), tiny_model_folder("gemma2"))


def test_surplus_layers_are_refused(broken, tiny_model_folder):
    def add(tensors):
        return tensors | {key.replace("layers.1", "layers.2"): value.clone() for key, value in tensors.items()}

    with pytest.raises(UserError, match=r"holds 14 tensors that the model has no place for, such as .*layers\.2\."):
        load(broken(tensors=add), tiny_model_folder("gemma2"))


def test_a_wrong_rank_is_refused(broken, tiny_model_folder):
    with pytest.raises(UserError, match=r"lora_A\.weight has rank 4, but adapter_config\.json says r=8"):
        load(broken(config={"r": 8}), tiny_model_folder("gemma2"))


def test_another_base_is_refused(released, tiny_model, chat_tokenizer, tmp_path):
    tiny_model("gemma2", hidden_size=96).save_pretrained(tmp_path / "wide")
    chat_tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"is \(64, 4\), but the model needs \(96, 4\); name the base"):
        load(released, tmp_path / "wide")


def test_modules_that_the_base_lacks_are_refused(broken, tiny_model_folder):
    with pytest.raises(UserError, match="does not fit the model .*Target modules"):
        load(broken(config={"target_modules": ["c_attn"]}), tiny_model_folder("gemma2"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "NOSUCH"}'])
def test_an_unreadable_config_is_one_sentence(broken, tiny_model_folder, text):
    folder = broken()
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json"):
        load(folder, tiny_model_folder("gemma2"))


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), None, "8"])
def test_an_adapter_that_would_do_nothing_or_harm_is_refused(broken, tiny_model_folder, alpha):
    with pytest.raises(UserError, match="adapter_config.json says `lora_alpha` .*; it is a number above 0"):
        load(broken(config={"lora_alpha": alpha}), tiny_model_folder("gemma2"))


def test_damaged_tensors_are_one_sentence(broken, tiny_model_folder):
    folder = broken()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        load(folder, tiny_model_folder("gemma2"))


def test_no_such_adapter(tiny_model_folder):
    for name in ("nowhere/at-all", "/no/such/folder", "gone"):
        with pytest.raises(UserError, match="neither a folder nor a hub id"):
            load(name, tiny_model_folder("gemma2"))


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda tensor: tensor.float().fill_(torch.nan), "holds NaN, infinity or a number beyond 65,504"),
        (lambda tensor: tensor.float().index_fill(0, torch.tensor([0]), -torch.inf), "holds NaN, infinity"),
        (lambda tensor: tensor.float().fill_(1e38), "holds NaN, infinity or a number beyond"),
        (lambda tensor: tensor.to(torch.int8), "holds int8; weights are floating-point numbers"),
        (lambda tensor: tensor.bool(), "holds bool; weights"),
    ],
)
def test_weights_that_are_no_weights_are_refused_by_name(broken, tiny_model_folder, spoil, sentence):
    key = f"base_model.model.model.layers.0.{SIDES['k_proj'][0]}.k_proj.lora_B.weight"
    adapter = broken(tensors=lambda weights: {**weights, key: spoil(weights[key])})
    with pytest.raises(UserError, match=f"{key} of adapter_model.safetensors {sentence}"):
        load(adapter, tiny_model_folder("gemma2"))


def test_settings_of_another_type_are_one_sentence_or_change_nothing(broken, tiny_model_folder):
    released = broken()
    file = released / "adapter_config.json"
    settings = json.loads(file.read_text())
    names = ("r", "lora_alpha", "target_modules", "peft_type", "rank_pattern", "alpha_pattern", "bias", "task_type")
    refused = 0
    for name in names:
        for value in (None, True, -1, 0, 0.5, "x", [1], {"x": []}):
            file.write_text(json.dumps({**settings, name: value}))
            try:
                load(released, tiny_model_folder("gemma2"))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error), (name, value)
    assert refused >= 20


def test_an_embedding_in_the_file_that_is_not_the_base_s_is_refused(broken, tiny_model_folder):
    """PEFT passes over one of another size, and puts one of the same size into the base, where no bundle keeps it."""
    key, folder = "base_model.model.model.embed_tokens.weight", tiny_model_folder("gemma2")
    own = load_file(Path(folder) / "model.safetensors")["model.embed_tokens.weight"]
    for embedding in (torch.cat([own, own[:8]]), own + 0.1):
        adapter = broken(tensors=lambda tensors: {**tensors, key: embedding})
        with pytest.raises(
            UserError, match="holds base_model.model.model.embed_tokens.weight, and the model has othe"
        ):
            load(adapter, folder)
        shutil.rmtree(adapter)
    load(broken(tensors=lambda tensors: {**tensors, key: own.bfloat16()}), folder)  # the same, in another dtype


def test_a_base_that_the_adapter_names_is_read_at_the_revision_it_names(broken, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loading, "_from_pretrained", lambda args, name, *rest: seen.append(args.model_revision) or 1 / 0
    )
    adapter = broken(config={"base_model_name_or_path": "org/base", "revision": "v2"})
    for base in (None, "org/other"):
        with pytest.raises(ZeroDivisionError):
            load(adapter, base)
    assert seen == ["v2", "main"]
