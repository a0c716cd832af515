"""vLLM after an update: the adapter hot-loaded against merged weights pushed, and what rollouts cost then."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from benchmarks.timing import compare
from peft import get_peft_model

from r2ec_trl.cli.dataset_choice import DataArguments, load_dataset
from r2ec_trl.cli.parsing import parse
from r2ec_trl.errors import UserError
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.loading import DEMO, PolicyArguments, load_policy, peft_config
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.policy.settings import RecommendationArguments
from r2ec_trl.vllm.engine import generate_reasoning_vllm, load_engine
from r2ec_trl.vllm.sync import AdapterSync, MergedSync

LOGPROB_NOISE = 0.1  # mean difference a token, bfloat16 engine against the policy; the base is further away


@dataclass
class SyncArguments(DataArguments, RecommendationArguments):
    """Sizes of the case."""

    users: int = field(default=8, metadata={"help": "Users of the dataset who get a reasoning."})
    max_completion_length: int = field(default=48, metadata={"help": "Longest reasoning in tokens."})
    rounds: int = field(default=3, metadata={"help": "Rounds of A B B A."})


def run(words: Sequence[str]) -> dict[str, Any]:
    """Bytes and seconds of a sync; with vLLM installed and a dataset named, also the speed of both samplers."""
    args, policy_args = parse((SyncArguments, PolicyArguments), words, description=__doc__)
    set_seed(0)
    policy_args.model_name_or_path = policy_args.model_name_or_path or DEMO
    model, tokenizer = load_policy(policy_args)
    policy = get_peft_model(model, peft_config(policy_args))
    _train_a_little(policy)
    policy = policy.to(Accelerator().device).eval()
    merged, adapter = _without_engine(MergedSync, policy), _without_engine(AdapterSync, policy)

    def push() -> None:
        for _ in merged._iter_named_params():
            pass

    def send() -> None:
        with adapter._adapter_folder():
            pass

    def parity() -> None:
        check_parity(policy, merged)
        send()

    names = {"what": "adapter handed over", "against": "merged weights computed"}
    result: dict[str, Any] = {
        "comparisons": [compare(send, push, parity=parity, rounds=args.rounds, **names)],
        "adapter_bytes": adapter.sync_bytes,
        "merged_bytes": merged.sync_bytes,
        "bytes_ratio": round(adapter.sync_bytes / merged.sync_bytes, 5),
    }
    if args.dataset is not None and importlib.util.find_spec("vllm") is not None:
        result["rollouts"] = compare_samplers(args, policy, tokenizer)
        result["comparisons"].append(result["rollouts"].pop("seconds"))
    return result


def _train_a_little(policy: torch.nn.Module) -> None:
    """An adapter that does something, as after some updates: B is zero at the start."""
    with torch.no_grad():
        for name, param in policy.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.002)


def _without_engine(kind: type[MergedSync], policy: torch.nn.Module) -> MergedSync:
    """The generation class of `kind`, ready to hand out weights."""
    kind = type(kind.__name__, (kind,), {"_init_vllm": lambda self: None})
    return kind(
        settings=SimpleNamespace(vllm_lora_folder=None),
        timed=contextlib.nullcontext,
        model=policy,
        accelerator=Accelerator(),
        processing_class=None,
    )


def check_parity(policy: Any, merged: MergedSync) -> None:
    """Stop unless the merged weights are those of PEFT's own merge."""
    plain = dict(copy.deepcopy(policy).merge_and_unload(safe_merge=True).named_parameters())
    sent = {name: weight for name, weight in merged._iter_named_params() if not torch.equal(weight, plain[name])}
    if sent:
        raise UserError(
            f"Merged weights differ from PEFT's own merge in {sorted(sent)[:3]}; no timing is worth printing."
        )


def compare_samplers(args: SyncArguments, policy: Any, tokenizer: Any) -> dict[str, Any]:
    """Greedy reasonings of the same users through vLLM, with the adapter hot-loaded, and through transformers."""
    dataset, card = load_dataset(args.dataset)
    args.category = args.category or card["category"]
    prompts = Prompts(tokenizer, args.prompt_config(), dataset["items"])
    reader = MarkerReader(tokenizer, args.marker)
    ids = [prompts.user_ids(user) for user in dataset["test"].select(range(args.users))]
    llm = load_engine(policy, args.max_prompt_length + args.max_completion_length)
    noise = logprob_differences(llm, policy, ids)
    rollouts: dict[str, list[Rollout]] = {}

    def vllm() -> None:
        rollouts["vllm"] = generate_reasoning_vllm(llm, reader, ids, args.max_completion_length)

    def transformers() -> None:
        rollouts["transformers"] = generate_reasoning(policy, reader, ids, args.max_completion_length)

    def parity() -> None:
        if noise["policy"] > LOGPROB_NOISE or noise["policy"] > noise["base"] / 2:
            raise UserError(f"vLLM is not the policy: log-probs differ by {noise}; no timing is worth printing.")
        vllm()  # compiles

    names = {"what": "greedy reasoning by vLLM", "against": "by transformers"}
    seconds = compare(vllm, transformers, parity=parity, rounds=args.rounds, **names)
    tokens = {name: sum(sum(rollout.trained) for rollout in rows) for name, rows in rollouts.items()}
    return {
        "seconds": seconds,
        "prompt_tokens": sum(map(len, ids)),
        "tokens": tokens,
        "vllm_tokens_per_second": round(tokens["vllm"] / seconds["ours_wall_seconds"], 1),
        "transformers_tokens_per_second": round(tokens["transformers"] / seconds["theirs_wall_seconds"], 1),
        "logprob_differences": noise,
    }


@torch.no_grad()
def logprob_differences(llm: Any, policy: Any, prompt_ids: list[list[int]], tokens: int = 16) -> dict[str, float]:
    """Mean difference a token of vLLM's log-probs of its greedy tokens from the policy's, and from its base's."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompt_ids], sampling_params=params, use_tqdm=False)
    sampled = [(output.prompt_token_ids, output.outputs[0]) for output in outputs]

    def difference() -> float:
        values = []
        for prompt, output in sampled:
            row = torch.tensor([[*prompt, *output.token_ids]], device=policy.device)
            logits = policy(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            ours = logits.gather(1, row[0, len(prompt) :, None])[:, 0].cpu()
            theirs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
            values.append((ours - torch.tensor(theirs)).abs())
        return round(torch.cat(values).mean().item(), 4)

    with policy.disable_adapter():
        base = difference()
    return {"policy": difference(), "base": base}
