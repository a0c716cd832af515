"""Greedy reasoning with transformers, and where its `generate` stops."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from r2ec_trl.policy.batching import check_length, length_sorted_batches
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
        self.window = 2 * len(reader.marker.encode()) + 2  # a token holds at least one byte, but for special ones

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Whether the newest tokens of each row hold the marker, `(batch,)`."""
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
        done = [self.reader.marker in self.reader.text(row) for row in tail.tolist()]
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
    """Wrap the base model's `generate` once, so that TRL's own call to it stops at the marker."""
    inner_generate = model.generate

    def generate(inputs=None, *args, **kwargs):
        input_ids = kwargs["input_ids"] if inputs is None else inputs
        criteria = StoppingCriteriaList([MarkerCriteria(reader, input_ids.shape[1])])
        criteria.extend(kwargs.pop("stopping_criteria", None) or [])
        if inputs is not None:
            args = (inputs, *args)
        return inner_generate(*args, stopping_criteria=criteria, **kwargs)

    model.generate = generate


@torch.no_grad()
def generate_reasoning(
    model: PreTrainedModel,
    reader: MarkerReader,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int = 32_768,
    watch: Watch | None = None,
) -> list[Rollout]:
    """
    Greedy reasoning of every prompt, up to the marker (paper §3, inference).

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
            Called after every token with a prompt's number and its ids so far (padded once
            it has ended); `True` ends it.

    Returns:
        `list[Rollout]`: in the order of the prompts.
    """
    tokenizer = reader.tokenizer
    stop_ids = reader.stop_ids(model.generation_config.eos_token_id)  # as TRL's sampling
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,  # the checkpoint's own sampling defaults would fill what is not said here
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        disable_compile=True,
    )
    device = next(model.parameters()).device
    rollouts: dict[int, Rollout] = {}
    lengths = [len(ids) + max_new_tokens for ids in prompt_ids]
    cures = "`max_prompt_length` or `max_completion_length`"
    check_length(model.config, max(lengths, default=0), "A user prompt and its reasoning", cures)
    batches = length_sorted_batches(lengths, batch_tokens)
    for batch in track(batches, "users reasoned"):
        length = len(prompt_ids[batch[0]])  # longest first
        input_ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):
            input_ids[row, length - len(prompt_ids[index]) :] = torch.tensor(prompt_ids[index])
            attention_mask[row, length - len(prompt_ids[index]) :] = 1
        criteria: list[StoppingCriteria] = [MarkerCriteria(reader, length)]
        if watch is not None:
            criteria.append(WatchCriteria(watch, batch, length))
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        for index, ids in zip(batch, output[:, length:].tolist(), strict=True):
            rollouts[index] = reader.finish(ids, [*stop_ids, tokenizer.pad_token_id])
    return [rollouts[index] for index in range(len(prompt_ids))]
