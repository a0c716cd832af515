"""Where a rollout ends: at the token that completes the marker, the same for every backend."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from transformers import PreTrainedTokenizerBase

Watch: TypeAlias = Callable[[int, list[int]], bool | None]  # prompt's number, ids so far -> whether to stop it


@dataclass(frozen=True)
class Rollout:
    """
    A reasoning that ends with the marker.

    Args:
        ids (`list[int]`):
            Token ids, the marker's included; the answer state is read at the last one.
        trained (`list[int]`):
            1 where the policy sampled the token, 0 where the marker was appended for it.
        has_marker (`bool`):
            Whether the policy wrote the marker itself.
        truncated (`bool`):
            Whether it was cut at the length limit, before a marker or an end-of-sequence token.
        overflows (`bool`):
            Whether the token that completes the marker carries more text behind it.
    """

    ids: list[int]
    trained: list[int]
    has_marker: bool
    truncated: bool
    overflows: bool


class Reasoner(Protocol):
    """
    Writes greedy reasonings, whatever the engine: [`~r2ec_trl.policy.generation.generate_reasoning`] or
    [`~r2ec_trl.vllm.engine.generate_reasoning_vllm`], bound to their model.
    """

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, watch: Watch | None = None
    ) -> list[Rollout]:
        """
        One rollout a prompt, in their order; `watch` sees a prompt's ids as they are written and may end it (vLLM:
        once whole).
        """


class MarkerReader:
    """
    Finds and completes the marker in token ids.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        marker (`str`):
            The string that ends a reasoning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker: str):
        self.tokenizer = tokenizer
        self.marker = marker
        self.marker_ids: list[int] = tokenizer(marker, add_special_tokens=False)["input_ids"]
        self.window = 2 * len(marker.encode()) + 2  # a token holds at least one byte, but for special ones
        self._may_end: dict[int, bool] = {}  # token -> whether it can complete the marker

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def completes(self, ids: Sequence[int]) -> bool:
        """Whether the newest tokens hold the marker; the text is looked at only where the last one can end it."""
        last = ids[-1] if ids else None
        if last is None:
            return False
        if last not in self._may_end:
            text = self.text([last])  # half a letter is no text yet
            self._may_end[last] = not text.strip() or "\ufffd" in text or self.marker[-1] in text
        return self._may_end[last] and self.marker in self.text(ids[-self.window :])

    def end(self, ids: Sequence[int]) -> int | None:
        """How many ids go up to and with the one that completes the first marker; `None` without a marker."""
        if self.marker not in self.text(ids):
            return None
        low, high = 1, len(ids)  # the answer grows monotonically with the prefix: search by halves
        while low < high:
            middle = (low + high) // 2
            if self.marker in self.text(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def finish(self, ids: Sequence[int], end_ids: Container[int]) -> Rollout:
        """
        Make a rollout of sampled ids: cut at the marker, or, without one, drop the end-of-sequence token with what
        follows and append the marker's ids, which are not trained.

        Args:
            ids (`Sequence[int]`):
                Sampled token ids.
            end_ids (`Container[int]`):
                Ids that end a generation: end-of-sequence and padding.
        """
        end = self.end(ids)
        if end is not None:
            kept = list(ids[:end])
            return Rollout(kept, [1] * end, True, False, not self.text(kept).endswith(self.marker))
        stop = next((position for position, token in enumerate(ids) if token in end_ids), None)
        kept = list(ids[:stop])
        trained = [1] * len(kept) + [0] * len(self.marker_ids)
        return Rollout(kept + self.marker_ids, trained, False, stop is None, False)

    def stop_ids(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        """Ids that end a generation: the tokenizer's end of sequence, and the model's one or many."""
        of_model = [eos_token_id] if eos_token_id is None or isinstance(eos_token_id, int) else eos_token_id
        return sorted({self.tokenizer.eos_token_id, *of_model} - {None})
