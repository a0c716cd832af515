"""Settings that all recipes share: prompts, scoring and evaluation of a recommender."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from r2ec_trl.errors import UserError
from r2ec_trl.policy.prompts import ITEM_TEMPLATE, USER_TEMPLATE, PromptConfig

PROMPT_PRESETS: dict[str, dict[str, Any]] = {
    "reference": {  # what the released adapters were trained with
        "marker": "<answer>",
        "item_fields": ["title", "average_rating", "rating_number", "description"],
        "similarity": "cosine",
        "item_temperature": 0.02,
    }
}


@dataclass
class RecommendationArguments:
    """
    What a recommender is made of besides its weights: prompts, scoring, evaluation. Shared by all recipes.

    The prompt fields are [`~r2ec_trl.policy.prompts.PromptConfig`]'s; see each field's help for the rest.
    """

    prompt_preset: str | None = field(
        default=None,
        metadata={
            "help": "'reference': marker, item fields (with the rating and number of buyers, which leak the future), "
            "similarity and τ of the released adapters. Fields set to anything but their defaults win.",
            "choices": sorted(PROMPT_PRESETS),
        },
    )
    category: str | None = field(
        default=None,
        metadata={"help": "Singular words for an item, e.g. 'video game'. By default the dataset card's."},
    )
    marker: str = field(default="<answer>", metadata={"help": "String at which writing ends and scoring begins."})
    closing: str = field(default="</answer>", metadata={"help": "Closing tag named in the instruction."})
    user_template: str = field(
        default=USER_TEMPLATE, metadata={"help": "User turn, with {category}, {marker}, {closing} and {history}."}
    )
    item_template: str = field(
        default=ITEM_TEMPLATE, metadata={"help": "Item turn, with {category}, {marker}, {closing} and {fields}."}
    )
    item_fields: list[str] = field(
        default_factory=lambda: ["title", "description"],
        metadata={"help": "Item columns in the item prompt, in this order."},
    )
    field_words: int = field(default=100, metadata={"help": "Longest item field in words; titles are never cut."})
    max_history_items: int = field(default=20, metadata={"help": "Newest purchases shown in the user prompt."})
    max_prompt_length: int = field(
        default=2048, metadata={"help": "Tokens of a user prompt; whole oldest purchases are cut."}
    )
    max_item_length: int = field(default=768, metadata={"help": "Tokens of an item prompt."})
    use_ratings: bool = field(default=True, metadata={"help": "Show the user's ratings where the data have them."})
    use_times: bool = field(default=True, metadata={"help": "Show how long ago purchases were, where known."})
    similarity: str = field(
        default="cosine",
        metadata={
            "help": "Score of an item: 'cosine' or 'dot' of answer state and row.",
            "choices": ["cosine", "dot"],
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
        default=16_384, metadata={"help": "Most tokens (padding included) of one forward without gradient."}
    )

    def __post_init__(self) -> None:
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
        names = {f.name for f in dataclasses.fields(PromptConfig)}
        values = {name: getattr(self, name) for name in names}
        return PromptConfig(**{**values, "category": self.category or "item"})

    @property
    def selection_metric(self) -> str:
        """The logged validation figure by which the best adapter is chosen."""
        return "recommendation/masked_ndcg@10" if self.selection_mask else "recommendation/ndcg@10"

    def check_scoring(self) -> None:
        """Raise [`UserError`] for scoring settings that mean nothing."""
        if self.item_temperature <= 0:
            raise UserError(f"`item_temperature` is {self.item_temperature}; it must be above 0 (reference: 0.02).")
        if self.max_eval_users is not None and self.max_eval_users < 1:
            raise UserError(f"`max_eval_users` is {self.max_eval_users}; give a positive number or leave it out.")
