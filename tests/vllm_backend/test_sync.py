"""What is sent to vLLM, without vLLM: merged weights that leave the base alone, and the adapter's way to a server."""

import contextlib
import copy
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration

from r2ec_trl.errors import UserError
from r2ec_trl.policy.rollouts import MarkerReader
from r2ec_trl.vllm import engine
from r2ec_trl.vllm.engine import use_adapter
from r2ec_trl.vllm.sync import AdapterSync, MergedSync

INIT_VLLM = MergedSync._init_vllm  # which the fixture replaces


@pytest.fixture
def sync_of(monkeypatch):
    """`sync_of(model, kind, **settings)` is a generation object without an engine."""
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
    monkeypatch.setattr(MergedSync, "_init_vllm", lambda self: None)

    def build(model, kind=MergedSync, mode="colocate", **settings):
        args = SimpleNamespace(**{"vllm_lora_folder": None, "vllm_lora_sync": kind is AdapterSync, **settings})
        accelerator = Accelerator(cpu=True)
        return kind(
            settings=args,
            timed=contextlib.nullcontext,
            model=model,
            accelerator=accelerator,
            processing_class=None,
            mode=mode,
            server_base_url="http://127.0.0.1:9/",
        )

    return build


def lora_policy(base, **lora):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))


def weights(params):
    return {name: weight.detach().clone() for name, weight in params}


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_merge_and_unload(tiny_model, sync_of, lora, dtype):
    """Qwen2, whose projections have biases: the same names and values as the plain model, tied head and all."""
    policy = lora_policy(tiny_model("qwen2", tie_word_embeddings=True).to(dtype), **lora)
    sent = weights(sync_of(policy)._iter_named_params())
    plain = copy.deepcopy(policy).merge_and_unload(safe_merge=True)
    expected = dict(plain.named_parameters())
    assert sent.keys() == expected.keys() and "lm_head.weight" not in sent
    assert all(torch.equal(sent[name], expected[name]) for name in sent)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    base = policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(sent[q_proj], base)


def base_weights(policy):
    return {name: param for name, param in policy.named_parameters() if "lora_" not in name}


def test_the_base_is_bit_identical_after_fifty_rounds(tiny_model, sync_of):
    """TRL's merge in place and unmerge drifts in bfloat16, and we do not write to the base at all."""
    policy = lora_policy(tiny_model("llama").bfloat16())
    start = {name: param.detach().clone() for name, param in base_weights(policy).items()}
    storage = {name: param.data_ptr() for name, param in base_weights(policy).items()}
    sync = sync_of(policy)
    first = weights(sync._iter_named_params())
    for _ in range(50):
        last = weights(sync._iter_named_params())
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert all(torch.equal(param, start[name]) for name, param in base_weights(policy).items())
    assert {name: param.data_ptr() for name, param in base_weights(policy).items()} == storage
    assert not any(layer.merged for layer in policy.modules() if isinstance(layer, LoraLayer))

    for _ in range(50):
        weights(VLLMGeneration._iter_named_params(sync))
    drifted = [not torch.equal(param, start[name]) for name, param in base_weights(policy).items()]
    assert sum(drifted) >= 14  # the seven projections of both layers


def test_a_sync_that_breaks_off_leaves_the_base_whole(tiny_model, sync_of):
    policy = lora_policy(tiny_model("llama"))
    start = {name: param.detach().clone() for name, param in base_weights(policy).items()}
    params = sync_of(policy)._iter_named_params()
    for name, _ in params:
        if "o_proj" in name:
            break
    params.close()
    assert all(torch.equal(param, start[name]) for name, param in base_weights(policy).items())
    assert not any(layer.merged for layer in policy.modules() if isinstance(layer, LoraLayer))


@pytest.mark.parametrize("adapter", [True, False])
def test_an_engine_gets_all_weights_in_one_call(tiny_model, sync_of, adapter):
    """TRL makes a call a tensor; what arrives, one after the other, is the same."""
    model = lora_policy(tiny_model("llama")) if adapter else tiny_model("llama")
    sync, calls = sync_of(model), []
    engine = SimpleNamespace(load_weights=lambda params: calls.append(weights(params)))
    runner = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=engine)))
    llm_engine = SimpleNamespace(model_executor=runner)
    sync.llm = SimpleNamespace(llm_engine=llm_engine, reset_prefix_cache=lambda: calls.append("prefixes forgotten"))
    sync.enable_sleep_mode = False
    sync.sync_weights()
    prefixes, sent = calls
    assert prefixes == "prefixes forgotten"
    VLLMGeneration.sync_weights(sync)  # TRL's own
    theirs = {name: weight for call in calls[2:-1] for name, weight in call.items()}
    assert len(calls) == 2 + len(sent) + 1 and sent.keys() == theirs.keys()
    assert all(torch.equal(sent[name], theirs[name]) for name in sent)


def test_full_fine_tuning_sends_what_trl_sends(tiny_model, sync_of):
    model = tiny_model("llama")
    sync = sync_of(model)
    sent = weights(sync._iter_named_params())
    assert sent.keys() == dict(model.named_parameters()).keys()
    assert sync.sync_bytes == sum(param.nbytes for param in model.parameters())


@pytest.mark.slow  # where bitsandbytes is installed
def test_a_four_bit_base_is_sent_dequantised(tiny_model_folder, sync_of):
    """
    bitsandbytes dequantises to the compute dtype and multiplies: so does a plain model with these weights. Merging
    into the packed weights, as TRL does, quantises the sum and loses most of a small adapter.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tiny_model_folder("llama")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    policy = lora_policy(packed)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40, 60)[None]
    sent = weights(sync_of(policy)._iter_named_params())
    with policy.disable_adapter():
        sent_base = weights(sync_of(policy)._iter_merged_params())
    with torch.no_grad():  # bitsandbytes packs anew for a CPU at the first forward: after the sync
        expected = policy(ids).logits
        with policy.disable_adapter():
            base = policy(ids).logits
        for params, logits in ((sent, expected), (sent_base, base)):
            assert plain.load_state_dict(params, strict=False).unexpected_keys == []
            assert (plain(ids).logits - logits).abs().mean() < 0.05  # its CPU kernel multiplies in bfloat16
    assert (base - expected).abs().mean() > 1


# ---------------------------------------------------------------- hot-loading
class Client:
    """Stands in for TRL's client: keeps what is posted, and reads the adapter while it is there, as a server does."""

    def __init__(self, status=200):
        self.model, self.posts, self.adapters, self.status = "org/policy", [], [], status
        self.session = self

    def post(self, url, json):
        self.posts.append((url.rsplit("/", 1)[1], json["lora_name"]))
        if "lora_path" in json:
            assert sorted(os.listdir(json["lora_path"])) == ["adapter_config.json", "adapter_model.safetensors"]
            self.adapters.append(
                (json["lora_path"], load_file(os.path.join(json["lora_path"], "adapter_model.safetensors")))
            )
        return SimpleNamespace(status_code=self.status, text="no such\nfolder")


def test_a_server_gets_each_adapter_under_its_own_name(tiny_model, sync_of):
    """
    Three syncs, each after a change: a name and folder of its own (the prefix cache keys on both), the weights as they
    are now, the one before unloaded, and no file left behind.
    """
    policy = lora_policy(tiny_model("llama"))
    sync = sync_of(policy, AdapterSync, mode="server")
    sync.vllm_client = client = Client()
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for step in range(3):
        with torch.no_grad():
            layer.fill_(float(step))
        sync.sync_weights()
        folder, state = client.adapters[-1]
        assert (state[key] == step).all() and len(state) == 28
        assert not os.path.exists(folder) and folder.startswith("/dev/shm")
        assert client.model.endswith(f"-{step + 1}")
    names = [name for action, name in client.posts if action == "load_lora_adapter"]
    later = sync_of(policy, AdapterSync, mode="server")  # another run, whose process has the same number
    later.vllm_client = other = Client()
    later.sync_weights()
    assert other.posts[0][1] not in names
    assert len(set(names)) == len({folder for folder, _ in client.adapters}) == 3
    assert [name for action, name in client.posts if action == "unload_lora_adapter"] == names[:2]
    assert 1 <= sync.sync_bytes / sum(tensor.nbytes for tensor in state.values()) < 1.2  # and a header


def test_the_adapter_goes_through_a_shared_folder(tiny_model, sync_of, tmp_path):
    sync = sync_of(lora_policy(tiny_model("llama")), AdapterSync, mode="server", vllm_lora_folder=str(tmp_path))
    sync.vllm_client = client = Client()
    sync.sync_weights()
    assert client.adapters[0][0].startswith(str(tmp_path)) and not os.listdir(tmp_path)


def test_a_server_that_refuses_the_adapter(tiny_model, sync_of):
    sync = sync_of(lora_policy(tiny_model("llama")), AdapterSync, mode="server")
    sync.vllm_client = Client(status=400)
    with pytest.raises(UserError, match="refused `load_lora_adapter` .no such folder.; it must see"):
        sync.sync_weights()


def test_a_server_that_dies_is_one_sentence(tiny_model, sync_of, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "check_server", lambda *args: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "_get", lambda *args: {"data": [{"id": "org/policy"}]})
    sync = sync_of(lora_policy(tiny_model("llama")), AdapterSync, mode="server", server_timeout=0)
    sync._connect()
    sync._bound_waiting(pauses=0)
    for call in (sync.sync_weights, lambda: sync.generate([[5, 6]], None, 1)):
        with pytest.raises(
            UserError, match="The vLLM server at http://127.0.0.1:9 stopped answering .ConnectionError"
        ):
            call()


# ---------------------------------------------------------------- greedy rollouts
def greedy_of(sync, monkeypatch, answer, processes=1):
    """`sync` with an engine that answers by `answer(prompts)`; `processes` of them, each with these prompts."""
    calls = []

    def generate(prompts, images, num_generations):
        calls.append((prompts, {name: vars(sync)[name] for name in ("temperature", "max_completion_length")}))
        return (prompts, *answer(prompts))

    monkeypatch.setattr(sync, "generate", generate)
    monkeypatch.setattr(sync, "sync_weights", lambda: calls.append("synced"))
    return calls


def test_greedy_rollouts_are_of_the_weights_of_now_and_sampling_goes_on_as_before(
    tiny_model, sync_of, monkeypatch, chat_tokenizer
):
    """This process has one prompt, another two: it fills up, gets one back, and samples at 1.5 again."""
    sync = sync_of(tiny_model("llama"))
    sync.temperature, sync.max_completion_length, sync.generation_kwargs = 1.5, 64, {"stop_token_ids": [1]}
    calls = greedy_of(sync, monkeypatch, lambda prompts: ([[7, 8]] * len(prompts), None))
    monkeypatch.setattr("r2ec_trl.vllm.sync.gather_object", lambda own: [2] if isinstance(own[0], int) else own)
    rollouts = sync.greedy(MarkerReader(chat_tokenizer, "<answer>"), [[5, 6]], 3)
    assert [rollout.ids[:2] for rollout in rollouts] == [[7, 8]]
    assert calls == ["synced", ([[5, 6], [5, 6]], {"temperature": 0.0, "max_completion_length": 3})]
    assert (sync.temperature, sync.max_completion_length) == (1.5, 64) and "logprobs" not in sync.generation_kwargs


def test_the_difference_of_an_engine_that_is_the_policy_is_none(tiny_model, sync_of, monkeypatch):
    """Log-probs of its own tokens, each predicted from the one before; those of an engine off by .25 are .25 off."""
    model = tiny_model("llama")
    sync = sync_of(model)
    for off in (0.0, 0.25):

        def answer(prompts, off=off):
            found = []
            for prompt in prompts:
                row = torch.tensor([[*prompt, 7, 8, 9]])
                scores = model(row).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + 2)
                found.append([[scores[at, row[0, at + 1]].item() - off] for at in places])
            return [[7, 8, 9]] * len(prompts), found

        greedy_of(sync, monkeypatch, answer)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"):
            setattr(sync, name, None)
        sync.generation_kwargs, sync.logprobs = {}, None
        assert sync.difference(model, [[5, 6], [3, 4, 5]]) == pytest.approx(off, abs=1e-5)


def test_an_adapter_that_is_switched_off_is_not_sent(tiny_model, sync_of):
    policy = lora_policy(tiny_model("llama"))
    with policy.disable_adapter():
        sent = weights(sync_of(policy)._iter_named_params())
    base = {name: param.detach() for name, param in tiny_model("llama").named_parameters()}
    assert all(torch.equal(sent[name], base[name]) for name in base)


def test_an_adapter_that_is_loaded_answers_from_here_on_and_no_prefix_is_remembered():
    calls = []

    class LLM:
        llm_engine = SimpleNamespace(add_lora=lambda request: calls.append(("loaded", request)))

        def generate(self, prompt, lora_request=None):
            calls.append((prompt, lora_request))

        def reset_prefix_cache(self):
            calls.append("prefixes forgotten")

    llm = LLM()
    use_adapter(llm, "adapter 2")
    llm.generate("x")
    assert calls == [("loaded", "adapter 2"), "prefixes forgotten", ("x", "adapter 2")]


def test_an_engine_has_the_positions_that_the_policy_has(tiny_model, monkeypatch, sync_of):
    """Scaled ones included: the other guards take as many."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    sync = sync_of(tiny_model("qwen2", max_position_embeddings=100, rope_parameters=yarn))
    monkeypatch.setattr("r2ec_trl.vllm.sync.check_settings", lambda settings, length: length == 400 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        INIT_VLLM(sync)


def test_what_an_engine_for_evaluation_is_asked_for(tiny_model, monkeypatch, chat_tokenizer):
    """Its length, the commit of the base, the dtype of forwards; and a padding token ends a reasoning there too."""
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    policy = lora_policy(tiny_model("llama"))
    policy.get_base_model().name_or_path, policy.config._commit_hash = "org/base", "c0ffee"
    options = engine.engine_options(policy, 99, trust_remote_code=True)
    assert {**options, "dtype": None} == {
        **{"model": "org/base", "revision": "c0ffee", "dtype": None, "trust_remote_code": True},
        **{"max_model_len": 99, "gpu_memory_utilization": 0.5, "enable_lora": True, "max_lora_rank": 8},
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.engine_options(policy)["dtype"] == torch.bfloat16 != options["dtype"]
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    config = SimpleNamespace(try_get_generation_config=lambda: {"eos_token_id": [7, 9]})
    params, ends = engine.sampling(config, MarkerReader(chat_tokenizer, "<answer>"), 5)
    stops = [chat_tokenizer.eos_token_id, 7, 9]
    assert (params["temperature"], params["max_tokens"], params["stop_token_ids"]) == (0.0, 5, stops)
    assert params["stop"] == ["<answer>"] and ends == {*stops, chat_tokenizer.pad_token_id}
