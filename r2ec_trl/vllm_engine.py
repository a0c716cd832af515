"""A vLLM engine for greedy reasoning in evaluation and recommendation (`--engine vllm`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig

from r2ec_trl.errors import UserError
from r2ec_trl.rollouts import MarkerReader, Rollout
from r2ec_trl.vllm_guards import adapter_refusal, check_installed, kernel_rank


def marker_stop(marker: str) -> dict[str, Any]:
    """Sampling parameters with which vLLM ends a rollout where [`~r2ec_trl.rollouts.MarkerReader`] does."""
    return {
        "stop": [marker],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a marker may be one, and MarkerReader reads them too
        "spaces_between_special_tokens": False,
    }


def load_engine(
    model_name: str,
    adapter: str | None = None,
    max_model_length: int | None = None,
    gpu_memory_utilization: float = 0.5,
    **options: Any,
) -> Any:
    """
    A vLLM engine whose `generate` answers with the adapter.

    Args:
        model_name (`str`):
            Folder or hub id of the unquantised base model (or of the whole policy).
        adapter (`str`, *optional*):
            Folder or hub id of a saved LoRA adapter.
        max_model_length (`int`, *optional*):
            Longest user prompt and reasoning together; by default the model's own.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.5`):
            Share of the GPU; the policy that scores items lives on the same one.
        options:
            Further arguments of `vllm.LLM`.

    Returns:
        `vllm.LLM`

    Raises:
        [`UserError`]: when vLLM is missing or cannot apply the adapter.
    """
    check_installed()
    lora: dict[str, Any] = {}
    if adapter is not None:
        config = PeftConfig.from_pretrained(adapter)
        if reason := adapter_refusal(config):
            raise UserError(f"vLLM cannot apply {reason}, as {adapter!r} is; leave `--engine vllm` out.")
        lora = {"enable_lora": True, "max_lora_rank": kernel_rank(config.r)}
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=model_name,
        max_model_len=max_model_length,
        gpu_memory_utilization=gpu_memory_utilization,
        **{**lora, **options},
    )
    if adapter is not None:
        request = LoRARequest("policy", 1, adapter)
        llm.generate = functools.partial(type(llm).generate, llm, lora_request=request)
    return llm


@torch.no_grad()
def generate_reasoning_vllm(
    llm: Any, reader: MarkerReader, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Rollout]:
    """
    Greedy reasoning of every prompt, as [`~r2ec_trl.rollouts.generate_reasoning`] but through vLLM, which batches by
    itself.

    Args:
        llm (`vllm.LLM`):
            An engine from [`load_engine`].
        reader ([`~r2ec_trl.rollouts.MarkerReader`]):
            Says where a rollout ends.
        prompt_ids (`Sequence[Sequence[int]]`):
            Token ids of the user prompts.
        max_new_tokens (`int`):
            Longest reasoning.

    Returns:
        `list[Rollout]`: in the order of the prompts.
    """
    from vllm import SamplingParams

    tokenizer = reader.tokenizer
    eos = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    params = SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(stop_ids), **marker_stop(reader.marker)
    )
    prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
    outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False)
    end_ids = sorted(stop_ids | {tokenizer.pad_token_id})
    return [reader.finish(list(output.outputs[0].token_ids), end_ids) for output in outputs]
