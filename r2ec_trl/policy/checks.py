"""Asked of a model before anything starts: places for LoRA, no dropout, padding that leaves no trace, no hub code."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from r2ec_trl.errors import UserError
from r2ec_trl.policy.adapters import base_of, is_packed
from r2ec_trl.policy.answer_state import encode_states, pad_left
from r2ec_trl.policy.batching import check_length
from r2ec_trl.policy.prompts import Prompts

logger = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 48
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest value; 16 bits and quantised weights:
LOW_TOLERANCE = 0.1
_BYPASSED = ("out_proj", "conv1d", "x_proj", "dt_proj")  # of Mamba: its kernels take their weights and no adapter


# ------------------------------------------------------------------------------------- code from the hub
def check_no_hub_code(config: PreTrainedConfig | dict, asked: str | None, trust_remote_code: bool) -> None:
    """
    Refuse kernels of the hub, which are code, where code is not trusted: in the base model's config as it is on disk,
    or asked for as `attn_implementation`.
    """
    values = config if isinstance(config, dict) else config.to_dict()
    named = [asked, *(value for key, value in _leaves(values) if "implementation" in key or "kernel" in key)]
    kernel = next((str(value) for value in named if isinstance(value, str) and "/" in value), None)
    if kernel and not trust_remote_code:
        raise UserError(
            f"The model asks for the kernel {kernel!r} of the hub, which is code; name another "
            "--attn_implementation, or add --trust_remote_code if you trust it."
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


# ---------------------------------------------------------------------------------------- where LoRA goes
def linear_names(model: torch.nn.Module) -> list[str]:
    """Last names of the linear layers inside a model's repeated blocks, those that can carry LoRA."""
    mamba = "mamba" in str(getattr(getattr(model, "config", None), "model_type", ""))
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and re.search(r"\.\d+\.", name)
    }
    return sorted(names - set(_BYPASSED if mamba else ()))


def absent_targets(targets: Sequence[str], model: torch.nn.Module) -> list[str]:
    """The targets that match no module of a model, by PEFT's rule for lists: the whole name or its end."""
    names = [name for name, _ in model.named_modules()]
    return [one for one in targets if not any(name == one or name.endswith(f".{one}") for name in names)]


def fit_targets(targets: Sequence[str] | str | None, model: torch.nn.Module) -> tuple[Sequence[str] | str, str | None]:
    """
    LoRA's targets on a model, and a sentence where they are not those asked for.

    Args:
        targets (`Sequence[str]` or `str`, *optional*):
            Names; `None` and the default seven projections stand for what the architecture has. A text is PEFT's:
            `"all-linear"` or a regular expression.
        model (`torch.nn.Module`):
            The base model; one without storage will do.

    Raises:
        [`UserError`]: when none of them is there.
    """
    own, kind = linear_names(model), type(model).__name__
    if isinstance(targets, str):
        try:
            found = targets == "all-linear" or any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        except re.error as error:
            raise UserError(f"`lora_target_modules` {targets!r} is no regular expression ({error}).") from error
        if not found:
            raise UserError(f"`lora_target_modules` {targets!r} matches no module of {kind}; it has {', '.join(own)}.")
        return targets, None
    absent = absent_targets(targets, model) if targets else list(PROJECTIONS)
    if not absent and targets:
        return targets, None
    if targets is None or set(targets) == set(PROJECTIONS):
        if not own:
            raise UserError(f"{kind} has no linear layer that could carry LoRA; add `--use_peft false`.")
        absent = [one for one in PROJECTIONS if one in absent]  # a set has no order
        return own, f"{kind} has no {', '.join(absent)}: LoRA goes on {', '.join(own)} (--lora_target_modules)."
    sentence = f"`lora_target_modules`: {', '.join(absent)} match no module of {kind}, which has {', '.join(own)}"
    if len(absent) == len(set(targets)):
        raise UserError(f"{sentence}; name some of those.")
    return targets, f"{sentence}; LoRA goes on the others."


def fit_adapter(config: PeftConfig | None, model: Any) -> PeftConfig | None:
    """A PEFT configuration with targets that `model` has; what had to change is said. See [`fit_targets`]."""
    if config is None or not isinstance(model, torch.nn.Module) or not hasattr(config, "target_modules"):
        return config
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        names = [name for name, _ in model.named_parameters()]
        if absent := [one for one in parameters if not any(f".{name}".endswith(f".{one}") for name in names)]:
            raise UserError(f"`lora_target_parameters`: {type(model).__name__} has no parameter {absent[0]!r}.")
    if parameters and not config.target_modules:
        return config
    config.target_modules, sentence = fit_targets(config.target_modules, model)
    if sentence:
        logger.warning(sentence)
    return config


# ----------------------------------------------------------------------------------------- measured
def switch_dropout_off(model: torch.nn.Module) -> None:
    """No dropout of any kind: modules, the numbers that layers pass to the functional one, and the configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(vars(module))
        config = getattr(module, "config", None)
        for one in (config, getattr(config, "text_config", None)):
            if isinstance(one, PreTrainedConfig):
                _zero_dropout(vars(one))


def _zero_dropout(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields[name] = 0.0


def check_start(
    model: Any, prompts: Prompts, item_ids: Sequence[Sequence[int]], completion: int | None, trains: bool = False
) -> None:
    """
    All that is asked of a model before it is used: positions for every prompt, a vocabulary with
    all of the items' tokens, a marker that can be written, and [`check_policy`].

    Args:
        model, prompts, trains:
            As in [`check_policy`].
        item_ids (`Sequence[Sequence[int]]`):
            Token ids of the item prompts.
        completion (`int`, *optional*):
            Tokens of the longest reasoning; `None` where none is written.
    """
    user = prompts.longest_user + len(prompts.marker_ids) + (completion or 0)
    cures = "`max_prompt_length` or `max_completion_length`" if completion else "`max_prompt_length`"
    check_length(model.config, user, "A user prompt and its reasoning", cures)
    check_length(model.config, max(map(len, item_ids), default=0), "Item prompts", "`max_item_length`")
    known, largest = getattr(model.config.get_text_config(), "vocab_size", None), max(map(max, item_ids), default=0)
    if known is not None and largest >= known:
        raise UserError(
            f"The tokenizer writes {prompts.tokenizer.convert_ids_to_tokens(largest)!r} as token {largest}, but the "
            f"model knows {known}; give the tokenizer that belongs to it, or resize its embeddings."
        )
    marker, ids = prompts.config.marker, prompts.marker_ids
    written = prompts.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if marker.strip() not in written:
        raise UserError(
            f"The tokenizer cannot write the `marker` {marker!r} (it reads back as {written!r:.80}), so no reasoning "
            "would end; give another one."
        )
    check_policy(model, prompts, generates=completion is not None, trains=trains)


@torch.no_grad()
def check_policy(model: Any, prompts: Prompts, generates: bool, trains: bool = False) -> None:
    """
    Measure on two short prompts that states are finite, the same alone and in a batch, and, where it trains, the same
    in every forward; where it generates, that padding changes no next token's scores.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy on its device, through [`~r2ec_trl.policy.answer_state.add_answer_state`].
        prompts ([`~r2ec_trl.policy.prompts.Prompts`]):
            Its prompts.
        generates, trains (`bool`):
            What it will do.

    Raises:
        [`UserError`]: for a model that cannot be used.
    """
    if is_deepspeed_zero3_enabled():
        return  # weights are shared out: nothing can run before the engine does
    kind = type(base_of(model)).__name__
    pad, was_training = prompts.tokenizer.pad_token_id, model.training
    probe = prompts.probe_ids[:PROBE_TOKENS]
    pair = [probe, probe[: max(1, len(probe) // 3)]]  # the shorter one is padded in a batch
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    tolerance = LOW_TOLERANCE if quantised else TOLERANCE.get(dtype, LOW_TOLERANCE)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted({device.index for device in devices})), _one_sentence(kind):
        # bitsandbytes packs a 4-bit base anew, with rounding, in the first forward of an evaluation on a CPU
        model.train(trains and any(map(is_packed, model.parameters())))
        states = encode_states(model, pair, pad)
        if not torch.isfinite(states).all():
            raise UserError(f"The states of {kind} are not finite numbers; its weights are damaged or overflow.")
        alone = torch.cat([encode_states(model, [ids], pad) for ids in pair])
        apart = _apart(states, alone)
        if generates:
            scores = _next_scores(model, pair, pad)
            if scores.isnan().any():
                raise UserError(f"The token scores of {kind} hold NaN; its LM head is damaged or overflows.")
            shorter = _next_scores(model, pair[1:], pad)
            apart = max(apart, _apart(scores, shorter))
            whole = model(input_ids=torch.tensor(pair[:1], device=model.device)).logits[:, len(pair[1]) - 1].float()
            if (ahead := _apart(whole, shorter)) > tolerance:
                raise UserError(
                    f"{kind} sees the tokens that come after one ({ahead:.1%} apart), so nothing it writes has a "
                    "probability; use a causal language model, or set `is_decoder` in its config.json."
                )
        if apart > tolerance:
            raise UserError(
                f"{kind} does not leave padding out of account: in a batch it answers otherwise than for a user alone "
                f"({apart:.1%} apart); use another model."
            )
        if trains:
            model.train()
            first, second = encode_states(model, pair, pad), encode_states(model, pair, pad)
            if (apart := _apart(first, second)) > tolerance:
                raise UserError(
                    f"{kind} keeps some dropout or noise while it trains: two forwards are {apart:.1%} apart, so old "
                    "and new log-probabilities cannot agree; set it to 0 in the model's config.json."
                )
    model.train(was_training)


@contextmanager
def _one_sentence(kind: str) -> Iterator[None]:
    """Whatever a model's own code raises on a prompt, but for a lack of memory."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        if "allocate memory" in str(error) or "CUDA" in str(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{kind} cannot read a short prompt as it is used here ({reason}); use another model."
        ) from error


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _next_scores(model: Any, sequences: Sequence[Sequence[int]], pad_token_id: int) -> torch.Tensor:
    """Scores of the token after the last of these sequences, `(1, V)`, by `generate`: padded on the left."""
    ids, mask = pad_left(sequences, pad_token_id, model.device)
    base = base_of(model)
    output = type(base).generate(  # the class's: an instance's may be wrapped, to stop or to count
        base,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    return output.logits[0][-1:].float()
