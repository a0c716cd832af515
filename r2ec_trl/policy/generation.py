"""Greedy reasoning with transformers, and where its `generate` stops."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from r2ec_trl.policy.adapters import base_of
from r2ec_trl.policy.answer_state import pad_left
from r2ec_trl.policy.batching import check_length, length_sorted_batches
from r2ec_trl.policy.decoding import decode, settings
from r2ec_trl.policy.rollouts import MarkerReader, Rollout, Watch
from r2ec_trl.progress import track


class MarkerCriteria(StoppingCriteria):
    """
    Stops each row of `generate` at the marker. Transformers' own stop strings need a byte-level tokenizer and may
    end elsewhere; this one asks the same question as [`MarkerReader`], of the last tokens only.
    """

    def __init__(self, reader: MarkerReader, prompt_length: int):
        self.reader = reader
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Whether the newest tokens of each row hold the marker, `(batch,)`."""
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.reader.window) :]
        done = [self.reader.completes(row) for row in tail.tolist()]
        return torch.tensor(done, device=input_ids.device)


class WatchCriteria(StoppingCriteria):
    """Shows a [`Watch`] what each row of `generate` has written so far; it may end the row."""

    def __init__(self, watch: Watch, numbers: Sequence[int], prompt_length: int):
        self.watch, self.numbers, self.prompt_length = watch, numbers, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Whether each row is to end, `(batch,)`."""
        rows = zip(self.numbers, input_ids[:, self.prompt_length :].tolist(), strict=True)
        return torch.tensor([bool(self.watch(number, ids)) for number, ids in rows], device=input_ids.device)


def stop_generate_at_marker(model: PreTrainedModel, reader: MarkerReader) -> None:
    """
    Wrap the base model's `generate` once, so that TRL's own call to it stops at the marker, and is answered by
    [`~r2ec_trl.policy.decoding.decode`] where that covers what is asked.
    """
    inner_generate = getattr(model.generate, "inner", model.generate)  # the wrapper of an earlier trainer gives way
    replaced = "generate" in vars(model) and not hasattr(model.generate, "inner")  # someone else's goes first

    def generate(inputs=None, *args, **kwargs):
        input_ids = kwargs["input_ids"] if inputs is None else inputs
        if (
            not replaced
            and inputs is None
            and not args
            and set(kwargs) == {"input_ids", "attention_mask", "generation_config"}
        ):
            config = settings(model, kwargs["generation_config"])
            if config is not None:
                return _decoded(model, reader, input_ids, kwargs["attention_mask"], config)
        criteria = StoppingCriteriaList([MarkerCriteria(reader, input_ids.shape[1])])
        criteria.extend(kwargs.pop("stopping_criteria", None) or [])
        if inputs is not None:
            args = (inputs, *args)
        return inner_generate(*args, stopping_criteria=criteria, **kwargs)

    generate.by_decoding = not replaced  # type: ignore[attr-defined]
    generate.inner = inner_generate  # type: ignore[attr-defined]
    model.generate = generate


def _decoded(
    model: PreTrainedModel,
    reader: MarkerReader,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    config: GenerationConfig,
) -> torch.Tensor:
    """What `generate` returns: prompts as they came, and completions padded on the right, `(rows, length)`."""
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    written = decode(model, reader, prompts, config)
    pad = config.pad_token_id
    output = input_ids.new_full((len(written), max(map(len, written))), 0 if pad is None else pad)
    for row, ids in enumerate(written):
        output[row, : len(ids)] = torch.tensor(ids, dtype=output.dtype)
    return torch.cat([input_ids, output], dim=1)


@torch.no_grad()
def generate_reasoning(
    model: PreTrainedModel,
    reader: MarkerReader,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int = 32_768,
    watch: Watch | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """
    Reasoning of every prompt up to the marker, greedy (paper §3, inference) unless `sampling` says how to draw.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        reader ([`MarkerReader`]):
            Says where a rollout ends.
        prompt_ids (`Sequence[Sequence[int]]`):
            Token ids of the user prompts.
        max_new_tokens (`int`):
            Longest reasoning; one without a marker by then gets it appended.
        batch_tokens (`int`, *optional*, defaults to `32768`):
            Most tokens in the cache at once: rows times (longest prompt + `max_new_tokens`).
        watch (`Callable`, *optional*):
            Called after every token with a prompt's number and its ids so far (padded once it
            has ended, where transformers' own `generate` goes on); `True` ends it.
        sampling (`Mapping`, *optional*):
            Settings of transformers' `GenerationConfig` in place of the greedy ones: `do_sample`, `temperature`, …

    Returns:
        `list[Rollout]`: in the order of the prompts.
    """
    tokenizer = reader.tokenizer
    stop_ids = reader.stop_ids(model.generation_config.eos_token_id)  # as TRL's sampling
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        # the checkpoint's own sampling defaults would fill what is not said here
        **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, **(sampling or {})},
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        disable_compile=True,
    )
    base = base_of(model)
    prompt_learning = base is not model and model.active_peft_config.is_prompt_learning
    changed = [part for part in (model, base) if "generate" in vars(part)]  # someone else's goes first
    ours = not prompt_learning and all(getattr(part.generate, "by_decoding", False) for part in changed)
    covered = settings(base, config) if ours else None
    end_ids = [*stop_ids, tokenizer.pad_token_id]
    device = next(model.parameters()).device
    rollouts: dict[int, Rollout] = {}
    lengths = [len(ids) + max_new_tokens for ids in prompt_ids]
    cures = "`max_prompt_length` or `max_completion_length`"
    check_length(model.config, max(lengths, default=0), "A user prompt and its reasoning", cures)
    batches = length_sorted_batches(lengths, batch_tokens)
    for batch in track(batches, "users reasoned"):
        if covered is not None:
            seen = None if watch is None else (lambda place, ids: watch(batch[place], ids))
            written = decode(base, reader, [prompt_ids[index] for index in batch], covered, seen)
            rollouts.update({i: reader.finish(ids, end_ids) for i, ids in zip(batch, written, strict=True)})
            continue
        length = len(prompt_ids[batch[0]])  # longest first
        input_ids, attention_mask = pad_left([prompt_ids[index] for index in batch], tokenizer.pad_token_id, device)
        criteria: list[StoppingCriteria] = [MarkerCriteria(reader, length)]
        if watch is not None:
            criteria.append(WatchCriteria(watch, batch, length))
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        for index, ids in zip(batch, output[:, length:].tolist(), strict=True):
            rollouts[index] = reader.finish(ids, end_ids)
    return [rollouts[index] for index in range(len(prompt_ids))]
