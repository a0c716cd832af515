"""Settings that all recipes share: prompts, scoring and evaluation of a recommender."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from r2ec_trl.errors import UserError
from r2ec_trl.policy.options import check_launch, check_options
from r2ec_trl.policy.prompts import PromptConfig
from r2ec_trl.policy.ranges import check_ranges

PROMPT_PRESETS: dict[str, dict[str, Any]] = {
    "reference": {  # what the released adapters were trained with
        "marker": "<answer>",
        "item_fields": ["title", "average_rating", "rating_number", "description"],
        "similarity": "cosine",
        "item_temperature": 0.02,
    }
}

SIMILARITIES = ("cosine", "dot")
FIELDS = {one.name: one for one in dataclasses.fields(PromptConfig)}


def _as_flag(one: dataclasses.Field) -> tuple[str, Any, Any]:
    """A prompt field as a command line takes it: a tuple becomes a list."""
    default = one.default
    if isinstance(default, tuple):
        return one.name, list[str], field(default_factory=lambda: list(default), metadata=one.metadata)
    return one.name, one.type, field(default=default, metadata=one.metadata)


PromptFlags: Any = dataclasses.make_dataclass("PromptFlags", map(_as_flag, FIELDS.values()))


@dataclass
class RecommendationArguments(PromptFlags):
    """
    What a recommender is made of besides its weights: prompts, scoring, evaluation. Shared by all recipes.

    The prompt fields are [`~r2ec_trl.policy.prompts.PromptConfig`]'s; see each field's help for the rest.
    """

    category: str | None = field(default=None, metadata=FIELDS["category"].metadata)  # a card's, where none is given
    prompt_preset: str | None = field(
        default=None,
        metadata={
            "help": "'reference': marker, item fields (with the rating and number of buyers, which leak the future), "
            "similarity and τ of the released adapters. Fields set to anything but their defaults win.",
            "choices": sorted(PROMPT_PRESETS),
        },
    )
    similarity: str = field(
        default="cosine",
        metadata={
            "help": "Score of an item: 'cosine' or 'dot' of answer state and row.",
            "choices": list(SIMILARITIES),
        },
    )
    item_temperature: float = field(default=0.02, metadata={"help": "τ of the item softmax (M2, M6, M8)."})
    max_eval_users: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many users only (validation while training)."}
    )
    selection_mask: bool = field(
        default=False,
        metadata={"help": "Choose the best adapter by the figure with the history masked instead of unmasked."},
    )
    forward_token_budget: int = field(
        default=16_384,
        metadata={
            "help": "Most tokens (padding included) of one forward over prompts; greedy reasoning takes twice as many."
        },
    )

    def __post_init__(self) -> None:
        check_launch()
        check_ranges(self)
        check_options(self)
        if self.similarity not in SIMILARITIES:
            raise UserError(f"`similarity` is {self.similarity!r}; give one of {', '.join(SIMILARITIES)}.")
        self._apply_prompt_preset()
        getattr(super(), "__post_init__", lambda: None)()  # TRL's and transformers' own, where they are parents

    def _apply_prompt_preset(self) -> None:
        if self.prompt_preset is None:
            return
        if self.prompt_preset not in PROMPT_PRESETS:
            raise UserError(f"`prompt_preset` is {self.prompt_preset!r}; give one of {', '.join(PROMPT_PRESETS)}.")
        plain = RecommendationArguments()
        for name, value in PROMPT_PRESETS[self.prompt_preset].items():
            if getattr(self, name) == getattr(plain, name):
                setattr(self, name, copy.copy(value))

    def prompt_config(self) -> PromptConfig:
        """The [`~r2ec_trl.policy.prompts.PromptConfig`] of these arguments."""
        values = {name: getattr(self, name) for name in FIELDS}
        return PromptConfig(**{**values, "category": self.category or "item"})

    @property
    def selection_metric(self) -> str:
        """The logged validation figure by which the best adapter is chosen."""
        return "recommendation/masked_ndcg@10" if self.selection_mask else "recommendation/ndcg@10"
