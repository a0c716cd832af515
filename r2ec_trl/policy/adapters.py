"""Saved LoRA adapters, the released ones included: read, checked against the base model, attached."""

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from r2ec_trl.errors import UserError, first_line

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_WEIGHT = 65_504.0  # the largest number of float16; no trained adapter comes near it


def adapter_folder(adapter: str) -> Path:
    """
    Local folder of an adapter, downloaded if `adapter` is a hub id; only its settings and safetensors are fetched.
    [`UserError`] when there is none, or its weights are a pickle.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"The adapter {adapter!r} is neither a folder nor a hub id that can be reached: {reason_of(error)}"
            ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"The adapter {adapter!r} has no {CONFIG_FILE}; give a folder that PEFT saved.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"The adapter {adapter!r} has no {WEIGHTS_FILE}; pickles (.bin) are not read, so save it again as "
            "safetensors."
        )
    return folder


def read_adapter_config(adapter: str) -> PeftConfig:
    """The adapter's PEFT settings; [`UserError`] when they cannot be read."""
    try:
        config = PeftConfig.from_pretrained(str(adapter_folder(adapter)))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, OSError, AttributeError, RecursionError) as error:
        raise UserError(f"The adapter {adapter!r}: {CONFIG_FILE} cannot be read: {reason_of(error)}") from error
    if config.peft_type != PeftType.LORA:
        raise UserError(
            f"The adapter {adapter!r}: {CONFIG_FILE} says `peft_type` {config.peft_type}; give a LoRA one."
        )
    if not (isinstance(config.lora_alpha, (int, float)) and 0 < config.lora_alpha < float("inf")):
        raise UserError(
            f"The adapter {adapter!r}: {CONFIG_FILE} says `lora_alpha` {config.lora_alpha!r}; it is a number above 0."
        )
    return config


def adapter_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The LoRA matrices of a model; none where it has no adapter."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def base_of(model: Any) -> Any:
    """The model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_packed(parameter: torch.nn.Parameter) -> bool:
    """Whether bitsandbytes holds a weight in 4 bits."""
    return type(parameter).__name__ == "Params4bit"


def attach_adapter(model: PreTrainedModel, adapter: str, config: PeftConfig, trainable: bool = False) -> PeftModel:
    """
    `model` with a saved adapter on it, every tensor accounted for.

    PEFT itself only warns of missing tensors and passes over surplus ones: what is left of an adapter then is a base
    model, and nobody notices.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base model. It need not have the name that the adapter records.
        adapter (`str`):
            Folder or hub id.
        config ([`~peft.PeftConfig`]):
            From [`read_adapter_config`].
        trainable (`bool`, *optional*, defaults to `False`):
            Whether the adapter is trained on.

    Raises:
        [`UserError`]: when adapter and model do not fit, in one sentence that says where.
    """
    folder = adapter_folder(adapter)
    name = model.config._name_or_path or type(model).__name__
    misfit = f"The adapter {adapter!r} does not fit the model {name!r}: "
    shapes = _tensor_shapes(folder / WEIGHTS_FILE, adapter)
    config.base_model_name_or_path = model.config._name_or_path
    changed = _changed_weights(folder / WEIGHTS_FILE, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing and mismatched tensors, which are errors below
            peft_model = PeftModel.from_pretrained(
                model,
                str(folder),
                config=config,
                is_trainable=trainable,
                ignore_mismatched_sizes=True,
                torch_device="cpu",
            )
            loaded = peft_model.load_adapter(
                str(folder), "default", is_trainable=trainable, ignore_mismatched_sizes=True, torch_device="cpu"
            )
    except torch.OutOfMemoryError:
        raise
    except (
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise UserError(f"{misfit}{reason_of(error)}") from error
    expected = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(peft_model).items()}
    for key in sorted(shapes.keys() & expected.keys()):
        if shapes[key] != expected[key]:
            raise UserError(f"{misfit}{_shape_sentence(key, shapes[key], expected[key])}")
    if surplus := sorted(changed - expected.keys()):
        raise UserError(
            f"{misfit}the file holds {surplus[0]}, and the model has others there (a vocabulary that was resized?); "
            "name the base with those weights."
        )
    for found, what in (
        (loaded.missing_keys, "the file lacks {} of the tensors that the settings and the model ask for, such as {}"),
        (loaded.unexpected_keys, "the file holds {} tensors that the model has no place for, such as {}"),
    ):
        if found:
            example = sorted(found)[0].replace(".default.", ".")
            raise UserError(f"{misfit}{what.format(len(found), example)}; name the base it was trained on.")
    return peft_model


def _tensor_shapes(file: Path, adapter: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                _check_values(tensors.get_tensor(key), f"The adapter {adapter!r}: {key} of {WEIGHTS_FILE}")
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"The adapter {adapter!r}: {WEIGHTS_FILE} is damaged: {reason_of(error)}") from error


def _changed_weights(file: Path, model: torch.nn.Module) -> set[str]:
    """Keys of whole weights in the file, as PEFT adds embeddings, which are not those of the base."""
    own, prefix = dict(model.named_parameters()), "base_model.model."
    with safe_open(file, framework="pt") as tensors:
        whole = {key: own[key.removeprefix(prefix)] for key in tensors.keys() if key.removeprefix(prefix) in own}
        return {key for key, weight in whole.items() if not _equal(tensors.get_tensor(key), weight.detach().cpu())}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for the rounding of another dtype."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-5)


def _check_values(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise UserError(
            f"{name} holds {str(tensor.dtype).removeprefix('torch.')}; weights are floating-point numbers."
        )
    if tensor.numel() and not tensor.abs().max() <= MAX_WEIGHT:  # NaN is not
        raise UserError(f"{name} holds NaN, infinity or a number beyond {MAX_WEIGHT:,.0f}; the file is damaged.")


def _shape_sentence(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    rank_axis = 0 if ".lora_A." in key else 1 if ".lora_B." in key else None
    if rank_axis is not None and found[rank_axis] != expected[rank_axis]:
        return (
            f"{key} has rank {found[rank_axis]}, but {CONFIG_FILE} says r={expected[rank_axis]}; the two files belong "
            "to different adapters."
        )
    return f"{key} is {found}, but the model needs {expected}; name the base it was trained on."


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, with single blanks, cut where it is too long to be read."""
    return " ".join(first_line(error).split())[:300]
