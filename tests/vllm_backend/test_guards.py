"""What cannot work with vLLM is one sentence, without a hang; no vLLM is needed, a local stub plays the server."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r2ec_trl.errors import UserError
from r2ec_trl.training.recpo_config import RecPOConfig
from r2ec_trl.vllm import guards as vllm_guards

MODEL = {"id": "org/policy", "root": "/models/policy", "max_model_len": 4096}


@pytest.fixture
def settings(tmp_path):
    """`settings(**fields)` are RecPOConfig's with vLLM."""

    def build(**fields):
        return RecPOConfig(str(tmp_path), use_cpu=True, use_vllm=True, **fields)

    return build


@pytest.fixture
def stub_server():
    """`stub_server({"/v1/models": (200, {...})})` serves these answers on this machine and returns the address."""
    servers = []

    def serve(answers, delay=0.0):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(delay)
                status, body = answers.get(self.path, (404, {"detail": "Not Found"}))
                payload = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def models(**changes):
    return {"/v1/models": (200, {"data": [MODEL | changes]})}


# --------------------------------------------------------------- installation
def test_vllm_not_installed(monkeypatch, make_trainer):
    """Said before prompts are made or a model is wrapped."""
    monkeypatch.setattr(vllm_guards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; `pip install 'r2ec_trl\[vllm\]'`"):
        make_trainer(use_vllm=True)


@pytest.mark.parametrize(
    ("use_vllm", "gpu", "installed", "said"),
    [(False, True, True, True), (True, True, True, False), (False, False, True, False), (False, True, False, False)],
)
def test_an_engine_that_is_there_but_not_used_is_named(monkeypatch, use_vllm, gpu, installed, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(vllm_guards.importlib.util, "find_spec", lambda name: name if installed else None)
    sentence = vllm_guards.unused_engine(SimpleNamespace(use_vllm=use_vllm))
    assert "--use_vllm" in sentence if said else sentence is None


@pytest.mark.parametrize(
    ("version", "fits"), [("0.21.1", False), ("0.22.0+cu130", True), ("0.31.0", True), ("0.32", False)]
)
def test_only_the_versions_trl_supports(monkeypatch, version, fits):
    monkeypatch.setattr(vllm_guards.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm_guards, "_installed_version", lambda: version)
    if fits:
        vllm_guards.check_installed()
    else:
        with pytest.raises(UserError, match=f"vLLM {version} is installed, but TRL works with 0.22.0 to 0.31.0"):
            vllm_guards.check_installed()


# ------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("fields", "context", "sentence"),
    [
        ({"vllm_max_model_length": 2048}, None, "need 2560, but `vllm_max_model_length` allows 2048"),
        ({}, 2048, "need 2560, but the model allows 2048"),
        ({"vllm_tensor_parallel_size": 2}, None, "`vllm_tensor_parallel_size` 2 with a colocated engine"),
        ({"vllm_enable_sleep_mode": True}, None, "`vllm_enable_sleep_mode` throws the engine's weights away"),
        ({"vllm_mode": "server"}, None, "goes over NCCL and needs a GPU; add `--vllm_lora_sync`"),
    ],
)
def test_settings_that_cannot_work(settings, monkeypatch, fields, context, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=sentence):
        vllm_guards.check_settings(settings(**fields), context)


def test_a_hot_loaded_adapter_goes_without_sleep(settings, monkeypatch):
    """Sleep is for merged weights on GPUs, where it passes; tensor parallelism for servers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vllm_guards.check_settings(settings(bf16=False, vllm_enable_sleep_mode=True))
    vllm_guards.check_settings(settings(bf16=False, vllm_mode="server", vllm_tensor_parallel_size=2))
    with pytest.raises(UserError, match="--vllm_lora_sync"):
        vllm_guards.check_settings(settings(bf16=False, vllm_lora_sync=True, vllm_enable_sleep_mode=True))


def test_lengths_that_just_fit(settings):
    vllm_guards.check_settings(settings(vllm_max_model_length=2560), 2560)


def test_hot_loading_without_vllm(make_trainer):
    with pytest.raises(UserError, match="`vllm_lora_sync` says how vLLM gets the adapter; add `--use_vllm`"):
        make_trainer(vllm_lora_sync=True)


# ---------------------------------------------------------------------- model
def policy(tiny_model, **lora):
    model = tiny_model("llama")
    model.name_or_path = "org/policy"
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **lora}))


@pytest.fixture(autouse=True)
def engine_takes_weights(monkeypatch):
    monkeypatch.setattr(vllm_guards, "_frees_packed_weights", lambda: False)


REFUSED_BY_HOT_LOADING = {
    "use_dora": ({"use_dora": True}, "a DoRA adapter"),
    "bias": ({"bias": "all"}, "an adapter with biases"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "an adapter with biases"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern`"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 2}}, "`alpha_pattern`"),
    "pissa": ({"init_lora_weights": "pissa"}, "initialisation .pissa. changed the base"),
    "rank": ({"r": 513}, "rank 513"),
}


@pytest.mark.parametrize("case", REFUSED_BY_HOT_LOADING)
def test_adapters_that_vllm_would_refuse_or_ignore(settings, case):
    lora, reason = REFUSED_BY_HOT_LOADING[case]
    config = LoraConfig(**{"target_modules": ["q_proj"], **lora})
    assert vllm_guards.adapter_refusal(LoraConfig(target_modules=["q_proj"])) is None
    assert re.search(reason, vllm_guards.adapter_refusal(config))


def test_whole_modules_beside_the_adapter(settings, tiny_model):
    for hot_load in (False, True):
        args = settings(vllm_lora_sync=hot_load)
        with pytest.raises(UserError, match="whole modules trained beside the adapter .`modules_to_save`"):
            vllm_guards.check_model(policy(tiny_model, modules_to_save=["lm_head"]), args)
        with pytest.raises(UserError, match="trainable_token_indices"):
            vllm_guards.check_model(policy(tiny_model, trainable_token_indices={"embed_tokens": [1]}), args)
        experts = policy(tiny_model)
        experts.peft_config["default"].target_parameters = ["mlp.experts.gate_up_proj"]
        with pytest.raises(UserError, match="nor one on experts .`target_parameters`"):
            vllm_guards.check_model(experts, args)
        vllm_guards.check_model(policy(tiny_model), args)


def test_an_adapter_on_the_head(settings, tiny_model):
    model = policy(tiny_model, target_modules=["q_proj", "lm_head"])
    vllm_guards.check_model(model, settings())
    with pytest.raises(UserError, match="leave `embed_tokens` and `lm_head` out"):
        vllm_guards.check_model(model, settings(vllm_lora_sync=True))
    model.get_base_model().config.tie_word_embeddings = True
    with pytest.raises(UserError, match="leave `embed_tokens` and `lm_head` out"):
        vllm_guards.check_model(model, settings())


def test_full_fine_tuning_is_pushed_whole(settings, tiny_model):
    model = tiny_model("llama")
    model.name_or_path = "org/policy"
    vllm_guards.check_model(model, settings())
    with pytest.raises(UserError, match="sends a LoRA adapter, and this run trains all weights"):
        vllm_guards.check_model(model, settings(vllm_lora_sync=True))


def test_a_model_that_is_nowhere_on_disk(settings, tiny_model):
    model = tiny_model("llama")
    model.name_or_path = ""
    with pytest.raises(UserError, match="vLLM reads the base from a folder or the hub"):
        vllm_guards.check_model(model, settings())


@pytest.mark.parametrize(
    ("quantization", "stored", "fields", "sentence"),
    [
        ({"load_in_4bit": False}, False, {}, "a bitsandbytes policy other than 4-bit"),
        ({"load_in_4bit": True}, True, {}, "This checkpoint is stored in 4 bits"),
        ({"load_in_4bit": True}, False, {"vllm_lora_sync": True, "vllm_mode": "server"}, "its own unquantised base"),
        ({"load_in_4bit": True}, False, {}, None),
        ({"load_in_4bit": True}, False, {"vllm_lora_sync": True}, None),
    ],
)
def test_quantised_bases(settings, tiny_model, monkeypatch, quantization, stored, fields, sentence):
    monkeypatch.setattr(vllm_guards, "_installed_version", lambda: "0.28.0")
    model = policy(tiny_model)
    config = SimpleNamespace(quant_method="bitsandbytes", **quantization)
    model.get_base_model().hf_quantizer = SimpleNamespace(quantization_config=config, pre_quantized=stored)
    if sentence is None:
        vllm_guards.check_model(model, settings(**fields))
        if fields:
            monkeypatch.setattr(vllm_guards, "_installed_version", lambda: "0.27.1+cpu")
            with pytest.raises(UserError, match="needs vLLM 0.28.0 or newer; 0.27.1.cpu is installed"):
                vllm_guards.check_model(model, settings(**fields))
        return
    with pytest.raises(UserError, match=sentence):
        vllm_guards.check_model(model, settings(**fields))


def test_policies_that_an_engine_for_evaluation_could_not_be(tiny_model):
    vllm_guards.check_evaluated(policy(tiny_model))
    with pytest.raises(UserError, match="cannot hot-load a DoRA adapter; leave `--engine vllm` out"):
        vllm_guards.check_evaluated(policy(tiny_model, use_dora=True))
    model = policy(tiny_model)
    model.get_base_model().hf_quantizer = SimpleNamespace()
    with pytest.raises(UserError, match="takes unquantised models"):
        vllm_guards.check_evaluated(model)


def test_a_cpu_engine_takes_no_pushed_weights(settings, tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_guards, "_frees_packed_weights", lambda: True)
    with pytest.raises(UserError, match="vLLM's CPU backend frees the weights it packs"):
        vllm_guards.check_model(policy(tiny_model), settings())
    vllm_guards.check_model(policy(tiny_model), settings(vllm_lora_sync=True))


# --------------------------------------------------------------------- server
def check(url, wait=0.0, name="org/policy", needed=2560, hot_load=False):
    vllm_guards.check_server(url, name, needed, wait, hot_load)


def test_a_server_with_the_right_model(stub_server):
    check(stub_server(models()))
    check(stub_server(models()), name="/elsewhere/policy/")
    check(stub_server(models(max_model_len=2560)))  # as many as are needed
    check(stub_server(models() | {"/v1/load_lora_adapter": (405, {})}), hot_load=True)


def test_a_dead_server_is_waited_for_no_longer_than_asked():
    start = time.monotonic()
    with pytest.raises(
        UserError, match="No vLLM server answers at http://127.0.0.1:9 .*refused.*`vllm serve org/policy`"
    ):
        check("http://127.0.0.1:9", wait=3.0)
    assert 1.5 < time.monotonic() - start < 6


def test_a_server_that_takes_the_call_and_says_nothing(stub_server, monkeypatch):
    monkeypatch.setattr(vllm_guards, "REQUEST_TIMEOUT", 0.3)
    with pytest.raises(UserError, match="No vLLM server answers at .*timed out"):
        check(stub_server(models(), delay=2.0))


def test_a_server_that_is_still_starting_is_waited_for(stub_server, monkeypatch):
    monkeypatch.setattr(vllm_guards, "RETRY_INTERVAL", 0.1)
    answers = {"/v1/models": (503, {})}
    url = stub_server(answers)
    threading.Timer(0.5, lambda: answers.update(models())).start()
    check(url, wait=5.0)


@pytest.mark.parametrize(
    "answers",
    [{}, *({"/v1/models": (200, body)} for body in (b"<html>", {"hello": 1}, {"data": []}, {"data": ["x"]}))],
)
def test_something_else_at_the_address(stub_server, answers):
    with pytest.raises(UserError, match="is no vLLM server; correct `--vllm_server_base_url`"):
        check(stub_server(answers), wait=60.0)


def test_a_server_of_another_protocol_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=lambda: listening.accept()[0].send(b"SSH-2.0-OpenSSH\r\n"), daemon=True).start()
        with pytest.raises(UserError, match="is no vLLM server"):
            check(address, wait=60.0)


def test_the_wrong_model_on_the_server(stub_server):
    with pytest.raises(
        UserError, match="serves 'org/other', but the policy is 'org/policy'; restart it with that model"
    ):
        check(stub_server(models(id="org/other", root="org/other")))


def test_a_server_with_too_little_room(stub_server):
    with pytest.raises(
        UserError, match="takes 1024 tokens, but prompt and reasoning need 2560; .*--max-model-len 2560"
    ):
        check(stub_server(models(max_model_len=1024)))


def test_a_server_that_takes_no_adapters(stub_server):
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve org/policy --enable-lora"):
        check(stub_server(models()), hot_load=True)


def test_the_smallest_kernel_that_holds_a_rank():
    assert [vllm_guards.kernel_rank(rank) for rank in (1, 4, 16, 17, 512)] == [1, 8, 16, 32, 512]
