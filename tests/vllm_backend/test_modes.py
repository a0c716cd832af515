"""
bfloat16 engines, as they are used: merged, hot-loaded, asleep while the policy trains, over a 4-bit base. On a GPU if
there is one, otherwise on vLLM's CPU backend, which cannot sleep:
`pytest tests/vllm_backend/test_modes.py -m "vllm or gpu"`.
Needs bitsandbytes besides what test_engine.py needs.
"""

import gc

import pytest
import torch
from test_engine import cpu_engine  # noqa: F401 (a fixture)

from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.loading import PolicyArguments, load_policy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ON_GPU = torch.cuda.is_available()
SHARE = 0.1  # of a GPU
NOISE = 0.1  # mean |Δ log-prob| a token, two ways of computing in bfloat16; a stale engine is ten times as far
WAYS = {
    "merged": {},
    "hot-loaded": {"vllm_lora_sync": True},
    "4-bit, merged": {"load_in_4bit": True},
    "4-bit, hot-loaded": {"load_in_4bit": True, "vllm_lora_sync": True},
    "merged, asleep, CUDA graphs": {"vllm_enable_sleep_mode": True},  # one a process: vLLM allows no second
}


@pytest.fixture
def build_trainer(make_trainer, tiny_model_folder, monkeypatch):
    """`build_trainer(way)` is a RecPOTrainer with a colocated engine, eager unless the way says CUDA graphs."""
    from r2ec_trl.vllm.sync import MergedSync

    options, built = MergedSync._engine_options, []

    def build(way):
        settings = {"max_completion_length": 12, "max_steps": 4, "learning_rate": 3e-2, "bf16": True, **WAYS[way]}
        eager = {"enforce_eager": "CUDA graphs" not in way}
        monkeypatch.setattr(MergedSync, "_engine_options", lambda self: {**options(self), **eager})
        model, _ = load_policy(
            PolicyArguments(
                model_name_or_path=str(tiny_model_folder("llama")),
                dtype="bfloat16",
                load_in_4bit=settings.pop("load_in_4bit", False),
            ),
            trainable=True,
        )
        device = {"use_cpu": not ON_GPU, "optim": "adamw_torch", "vllm_gpu_memory_utilization": SHARE}
        built.append(make_trainer(model=model, use_vllm=True, max_prompt_length=300, **device, **settings))
        return built[-1]

    yield build
    for trainer in built:
        trainer.vllm_generation.close()
        trainer.__dict__.pop("vllm_generation", None)
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def differences(trainer):
    """Mean |Δ log-prob| of each step's rollouts between the engine that drew them and the policy."""
    trainer.train()
    key = "sampling/sampling_logp_difference/mean"
    series = [log[key] for log in trainer.state.log_history if key in log]
    assert len(series) == 4
    return series


def monitor(owner, method):
    """The free memory of the GPU each time a method is called from now on."""
    inner, free = getattr(owner, method), []

    def call(*args, **kwargs):
        free.append(torch.cuda.mem_get_info()[0])
        return inner(*args, **kwargs)

    setattr(owner, method, call)
    return free


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.gpu if "asleep" in way else ()) for way in WAYS])
def test_the_engine_is_the_policy_after_each_update(build_trainer, way):
    trainer = build_trainer(way)
    if "asleep" in way:
        training, generating = monitor(trainer, "_compute_loss"), monitor(trainer.vllm_generation.llm, "generate")
    assert max(differences(trainer)) < NOISE
    if "asleep" in way:  # cache and weights of the engine are gone while the policy trains
        share = SHARE * torch.cuda.get_device_properties(0).total_memory
        assert min(training) - max(generating) > 0.5 * share
    prompts = [trainer.prompts.user_ids(user) for user in trainer.eval_dataset]
    rollouts = trainer.vllm_generation.greedy(trainer.reader, prompts, 3)
    with trainer.frozen_policy() as model:
        expected = generate_reasoning(model, trainer.reader, prompts, 3)
    same = sum(a == b for a, b in zip(rollouts, expected, strict=True))
    assert same >= len(prompts) / 2  # near-ties fall either way


@pytest.mark.parametrize("way", ["merged", "4-bit, hot-loaded"])
def test_a_stale_engine_is_noticed(build_trainer, way):
    """The twin of the test above: only the first sync happens."""
    trainer = build_trainer(way)
    sync, calls = trainer.vllm_generation.sync_weights, []
    trainer.vllm_generation.sync_weights = lambda: calls.append(sync() if not calls else None)
    first, *later = differences(trainer)
    assert first < NOISE and min(later) > 3 * NOISE
