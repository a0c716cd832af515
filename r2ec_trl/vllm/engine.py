"""A vLLM engine for greedy reasoning in evaluation and recommendation (`--engine vllm`)."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from r2ec_trl.policy.rollouts import MarkerReader, Rollout, Watch
from r2ec_trl.vllm.guards import check_evaluated, check_installed, kernel_rank

MEMORY_FOLDER = "/dev/shm"  # files here are memory; the usual temporary folder where there is none


def marker_stop(marker: str) -> dict[str, Any]:
    """Sampling parameters with which vLLM ends a rollout where [`~r2ec_trl.policy.rollouts.MarkerReader`] does."""
    return {
        "stop": [marker],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a marker may be one, and MarkerReader reads them too
        "spaces_between_special_tokens": False,
    }


@contextmanager
def adapter_folder(model: Any, parent: str | None = None) -> Iterator[Path]:
    """The active LoRA adapter as PEFT saves it, in memory (or in `parent`), for as long as the context lasts."""
    name = model.active_adapters[0]
    memory = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="r2ec-adapter-", dir=parent or memory) as folder:
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(state, Path(folder) / "adapter_model.safetensors")
        model.peft_config[name].save_pretrained(folder)
        os.chmod(folder, 0o755)  # a server may run as another user
        yield Path(folder)


def load_engine(
    policy: Any, max_model_length: int | None = None, gpu_memory_utilization: float = 0.5, **options: Any
) -> Any:
    """
    A vLLM engine that answers as a policy does, its adapter included. For one process; trainers have their own.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            An unquantised model from a folder or the hub, as it was loaded, with or without a LoRA adapter.
        max_model_length (`int`, *optional*):
            Longest user prompt and reasoning together; by default the model's own.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.5`):
            Share of the GPU; the policy that scores items lives on the same one.
        options:
            Further arguments of `vllm.LLM`.

    Returns:
        `vllm.LLM`

    Raises:
        [`UserError`]: when vLLM is missing or cannot be this policy.
    """
    options = engine_options(policy, max_model_length, gpu_memory_utilization, **options)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(**options)
    if "enable_lora" in options:
        with adapter_folder(policy) as folder:
            use_adapter(llm, LoRARequest("policy", 1, str(folder)))
    return llm


def engine_options(
    policy: Any, max_model_length: int | None = None, gpu_memory_utilization: float = 0.5, **options: Any
) -> dict[str, Any]:
    """Arguments of an engine, vLLM's own names, that answers as the policy does; checked as in [`load_engine`]."""
    check_installed()
    check_evaluated(policy)
    device = next(policy.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else policy.dtype
    options = {"dtype": dtype, "revision": base_revision(policy), **options}
    if is_peft_model(policy):
        rank = policy.peft_config[policy.active_adapters[0]].r
        options |= {"enable_lora": True, "max_lora_rank": kernel_rank(rank)}
    limits = {"max_model_len": max_model_length, "gpu_memory_utilization": gpu_memory_utilization}
    return {"model": policy.name_or_path, **limits, **options}


def base_revision(policy: Any) -> str | None:
    """The commit of the hub at which a policy's base was loaded: vLLM must not read a newer one."""
    return getattr(policy.config, "_commit_hash", None)


def use_adapter(llm: Any, request: Any) -> None:
    """Load an adapter now, and let `generate` answer with it from here on."""
    llm.llm_engine.add_lora(request)
    llm.generate = functools.partial(type(llm).generate, llm, lora_request=request)
    llm.reset_prefix_cache()


@torch.no_grad()
def generate_reasoning_vllm(
    llm: Any,
    reader: MarkerReader,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    watch: Watch | None = None,
) -> list[Rollout]:
    """
    Greedy reasoning of every prompt, as [`~r2ec_trl.policy.generation.generate_reasoning`] but through vLLM,
    which batches by itself.

    Args:
        llm (`vllm.LLM`):
            An engine from [`load_engine`].
        reader ([`~r2ec_trl.policy.rollouts.MarkerReader`]):
            Says where a rollout ends.
        prompt_ids (`Sequence[Sequence[int]]`):
            Token ids of the user prompts.
        max_new_tokens (`int`):
            Longest reasoning.
        watch (`Callable`, *optional*):
            Called with a prompt's number and its ids once they are whole.

    Returns:
        `list[Rollout]`: in the order of the prompts.
    """
    params, end_ids = sampling(llm.llm_engine.model_config, reader, max_new_tokens)
    prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
    outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False)
    if watch is not None:
        for number, output in enumerate(outputs):
            watch(number, list(output.outputs[0].token_ids))
    return [reader.finish(list(output.outputs[0].token_ids), end_ids) for output in outputs]


def sampling(model_config: Any, reader: MarkerReader, max_new_tokens: int) -> tuple[Any, set[Any]]:
    """Greedy sampling parameters that end where the reader says, and the ids that end a generation."""
    from vllm import SamplingParams

    stop_ids = reader.stop_ids(model_config.try_get_generation_config().get("eos_token_id"))
    params = SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=stop_ids, **marker_stop(reader.marker)
    )
    return params, {*stop_ids, reader.tokenizer.pad_token_id}
