"""User and item prompts (paper §3): whole oldest purchases are cut, never the instruction or the marker."""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from r2ec_trl.errors import UserError
from r2ec_trl.policy.chat import Chat, Messages, template_options
from r2ec_trl.policy.plain_text import PlainText
from r2ec_trl.policy.purchases import purchase_values
from r2ec_trl.policy.ranges import check_ranges

logger = logging.getLogger(__name__)

USER_TEMPLATE = (
    "Think in depth about the purchases below: what does this customer need, like and already own, and what comes "
    "next? Write down your reasoning, and finally recommend the next {category} for this customer inside {marker} "
    "and {closing}, for example {marker} a {category} that fits {closing}.\n\nPurchases, oldest first:\n{history}"
)
ITEM_TEMPLATE = "Summarise the key attributes of the following {category} inside {marker} and {closing}.\n\n{fields}"
FIELD_LABELS = {"average_rating": "Average rating", "rating_number": "Number of buyers"}
LONG_WORD = 40  # characters: no word of a language with blanks
MAX_SHARING = 10  # a catalogue with fewer different prompts than one for so many titles shows the wrong columns
# not in fingerprints of 0.1.0; at their defaults they say nothing
LATER_FIELDS = ("prompt_date", "chat_template_kwargs", "no_history")
_UNITS = ((31_536_000, "year"), (2_592_000, "month"), (604_800, "week"), (86_400, "day"), (3_600, "hour"))


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PromptConfig:
    """
    What a prompt is made of. Stored with every table and result, since another prompt is another recommender.

    Each field's `help` says what it is; [`~r2ec_trl.policy.settings.RecommendationArguments`] takes fields, defaults
    and help from here. Item fields that are empty or absent are left out of a prompt. Ratings and numbers of buyers
    gathered after the split leak the future, so they are not among the default fields.
    """

    category: str = _field("item", "Singular words for an item, e.g. 'video game'. By default the dataset card's.")
    marker: str = _field("<answer>", "String at which writing ends and scoring begins.")
    closing: str = _field("</answer>", "Closing tag named in the instruction.")
    user_template: str = _field(USER_TEMPLATE, "User turn, with {category}, {marker}, {closing} and {history}.")
    item_template: str = _field(ITEM_TEMPLATE, "Item turn, with {category}, {marker}, {closing} and {fields}.")
    item_fields: tuple[str, ...] = _field(("title", "description"), "Item columns in the item prompt, in this order.")
    field_words: int = _field(100, "Longest item field in words; titles are never cut.")
    max_history_items: int = _field(20, "Newest purchases shown in the user prompt.")
    max_prompt_length: int = _field(2048, "Tokens of a user prompt; whole oldest purchases are cut.")
    max_item_length: int = _field(768, "Tokens of an item prompt.")
    use_ratings: bool = _field(True, "Show the user's ratings where the data have them.")
    use_times: bool = _field(True, "Show how long ago purchases were, where known.")
    no_history: str = _field("- none yet", "Line of a user without any purchase.")
    prompt_date: str = _field("2024-07-26", "Day (YYYY-MM-DD) that a chat template is told: prompts know no clock.")
    chat_template_kwargs: dict | str | None = _field(
        None, 'Variables of the chat template as a JSON object, such as {"enable_thinking": false}.'
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_fields", tuple(self.item_fields))
        for name, needed in (("user_template", "{history}"), ("item_template", "{fields}")):
            if needed not in getattr(self, name):
                raise UserError(f"`{name}` lacks the placeholder {needed}; put it where that text belongs.")
        if not self.marker.strip():
            raise UserError("`marker` is empty; give the string at which the model recommends, such as '<answer>'.")
        check_ranges(self)
        object.__setattr__(self, "prompt_date", str(self.prompt_date))
        object.__setattr__(self, "chat_template_kwargs", template_options(self.chat_template_kwargs) or None)
        try:
            date.fromisoformat(self.prompt_date)
        except ValueError as error:
            raise UserError(f"`prompt_date` is {self.prompt_date!r}; give a day as YYYY-MM-DD.") from error

    def fingerprint(self) -> str:
        """SHA-256 (hex) of every field: equal for equal prompts, whichever version of this library made them."""
        fields = {one.name: one.default for one in dataclasses.fields(self) if one.name in LATER_FIELDS}
        said = {name: value for name, value in dataclasses.asdict(self).items() if fields.get(name, ...) != value}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def time_since(seconds: float) -> str:
    """
    Words for a time span in seconds, rounded down to its largest unit.

    >>> time_since(3 * 86_400 + 5), time_since(60)
    ('3 days ago', 'within the hour')
    """
    for size, unit in _UNITS:
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "within the hour"


class Prompts:
    """
    Makes user and item prompts for one tokenizer and one catalogue.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer. One without a chat template gets a plain one.
        config ([`PromptConfig`]):
            What a prompt is made of.
        item_dataset ([`~datasets.Dataset`]):
            The catalogue: `item_id`, `title` and any further columns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, item_dataset: Dataset):
        self.tokenizer = tokenizer
        self.config = config
        self.chat = Chat(tokenizer, config.prompt_date, template_options(config.chat_template_kwargs))
        self.plain = PlainText(tokenizer, (config.marker, config.closing))
        self.titles: dict[str, str] = dict(
            zip(item_dataset["item_id"][:], item_dataset["title"][:], strict=True)  # [:] reads a column at once
        )
        self.marker_ids: list[int] = tokenizer(config.marker, add_special_tokens=False)["input_ids"]
        self._neutral = {
            template: self.chat.ids(self._messages(template, "x"))
            for template in (config.user_template, config.item_template)
        }
        self.longest_user = 0  # tokens of the longest user prompt made so far
        if absent := [name for name in config.item_fields if name not in item_dataset.column_names]:
            logger.warning("The catalogue has no column %s: item prompts go without.", ", ".join(absent))

    @property
    def probe_ids(self) -> list[int]:
        """Token ids of a user prompt without purchases, to try a model with."""
        return self._neutral[self.config.user_template] + self.marker_ids

    def user_messages(self, example: Mapping[str, Any]) -> Messages:
        """
        Chat messages of a user prompt; as many of the newest purchases as fit `max_prompt_length` tokens, or a line
        that says there are none.

        Args:
            example (`Mapping`):
                A dataset row: `history` (item ids, oldest first) or `history_titles`, optionally `history_ratings`,
                `history_timestamps` and `timestamp` (seconds).

        Raises:
            [`UserError`]: if the instruction and the newest purchase alone are too long.
        """
        return self._user_turn(example)[0]

    def user_ids(self, example: Mapping[str, Any]) -> list[int]:
        """Token ids of a user prompt, generation prompt included."""
        return self._user_turn(example)[1]

    def _user_turn(self, example: Mapping[str, Any]) -> tuple[Messages, list[int]]:
        name = f"User {example.get('user_id', '?')}"
        lines = self._purchase_lines(example)[-self.config.max_history_items :]
        lines = lines or [self.config.no_history]
        most = self.config.max_prompt_length
        turn = functools.cache(lambda start: self._turn(self.config.user_template, lines[start:], name))
        start = 0
        if len(turn(0)[1]) > most:  # by halves: a long history is not tokenised once a purchase
            start = bisect_left(range(len(lines) - 1), True, key=lambda at: len(turn(at)[1]) <= most)
        messages, ids = turn(start)
        if len(ids) > most:
            raise UserError(
                f"{name}: the instruction and the newest purchase take {len(ids)} tokens; raise `max_prompt_length` "
                f"({most})."
            )
        self.longest_user = max(self.longest_user, len(ids))
        return messages, ids

    def item_ids(self, item: Mapping[str, Any]) -> list[int]:
        """
        Token ids of an item prompt, which end with the marker: the item's row is the state at the last one.

        Fields are cut from the tail of the last one backwards until `max_item_length` is met; the title stays whole.
        """
        limit = self.config.max_item_length - len(self.marker_ids)
        words = {name: self._field(item, name).split() for name in self.config.item_fields}
        words = {name: text if name == "title" else text[: self.config.field_words] for name, text in words.items()}
        ids = self._item_ids(words, item)
        while len(ids) > limit:
            name = next((name for name in reversed(words) if name != "title" and words[name]), None)
            if name is None:
                raise UserError(
                    f"Item {item['item_id']}: the instruction and the title take {len(ids)} tokens; raise "
                    f"`max_item_length` ({self.config.max_item_length})."
                )
            share = limit / len(ids)
            keep = min(len(words[name]) - 1, int(len(words[name]) * share))
            last = words[name][-1]
            if len(words[name]) == 1 and len(last) > LONG_WORD:  # text of a language without blanks
                words[name] = [last[: min(len(last) - 1, int(len(last) * share))]]
            else:
                words[name] = words[name][:keep]
            ids = self._item_ids(words, item)
        return ids + self.marker_ids

    def title_ids(self, item_id: str, words: int) -> list[int]:
        """Token ids of the first `words` words of an item's title, as text: no special token is among them."""
        for clean in (self.plain.clean, self.plain.bare):
            text = " ".join(clean(self.titles[item_id]).split()[:words])
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not self.plain.specials(ids):
                return ids
        raise UserError(f"Item {item_id}: the tokenizer reads its title as special tokens; change the title.")

    def fingerprint(self, dataset: Dataset) -> str:
        """Fingerprint for [`~datasets.Dataset.map`] of a dataset that these prompts are added to."""
        return hashlib.sha256((dataset._fingerprint + self.rendered_fingerprint()).encode()).hexdigest()[:16]

    def rendered_fingerprint(self) -> str:
        """SHA-256 (hex) of the fields and of the token ids that template and tokenizer make around the data."""
        return hashlib.sha256(
            (self.config.fingerprint() + json.dumps(list(self._neutral.values()))).encode()
        ).hexdigest()

    def catalogue_ids(self, item_dataset: Iterable[Mapping[str, Any]]) -> list[list[int]]:
        """
        Item prompts' token ids for a whole catalogue, in its order.

        Raises:
            [`UserError`]: if the prompts are (nearly) all the same while the titles are not.
        """
        ids, titles = [], set()
        for item in item_dataset:
            ids.append(self.item_ids(item))
            titles.add(item.get("title"))
        if len(titles) > 1 and (distinct := len(set(map(tuple, ids)))) * MAX_SHARING <= max(len(titles), MAX_SHARING):
            raise UserError(
                f"{len(titles):,} titles make only {distinct:,} different item prompts, so no item can be told from "
                f"another; `item_fields` {list(self.config.item_fields)} must name columns of the catalogue."
            )
        return ids

    def _item_ids(self, words: Mapping[str, list[str]], item: Mapping[str, Any]) -> list[int]:
        fields = [f"{_label(name)}: {' '.join(text)}" for name, text in words.items() if text]
        return self._turn(self.config.item_template, fields, f"Item {item['item_id']}")[1]

    def _turn(self, template: str, lines: list[str], name: str) -> tuple[Messages, list[int]]:
        """
        Messages and token ids of one prompt: the only place where data become tokens. They are text: were they read as
        special tokens in spite of [`PlainText.clean`] (a tokenizer may change letters first), their marks would go.
        """
        expected = self.plain.specials(self._neutral[template])
        for clean in (self.plain.clean, self.plain.bare):
            messages = self._messages(template, "\n".join(map(clean, lines)))
            ids = self.chat.ids(messages)
            if self.plain.specials(ids) == expected:
                return messages, ids
        raise UserError(f"{name}: the tokenizer reads its text as special tokens; change the text.")

    def _messages(self, template: str, data: str) -> Messages:
        place = "history" if template == self.config.user_template else "fields"
        words = {"marker": self.config.marker, "closing": self.config.closing}
        words |= {"category": self.plain.clean(self.config.category), place: data}
        # In one pass, and not by str.format: category, titles and templates may hold braces
        template = re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), template)
        return self.chat.messages(template)

    def _purchase_lines(self, example: Mapping[str, Any]) -> list[str]:
        titles = example.get("history_titles")
        if titles is None:
            if missing := [item_id for item_id in example["history"] if item_id not in self.titles]:
                raise UserError(f"User {example.get('user_id', '?')}: item {missing[0]!r} is not in the catalogue.")
            titles = [self.titles[item_id] for item_id in example["history"]]
        ratings, times, now = purchase_values(example, len(titles), f"User {example.get('user_id', '?')}")
        lines = []
        for title, rating, time in zip(titles, ratings, times, strict=True):
            since = f"{time_since(now - time)}: " if time is not None and self.config.use_times else ""
            stars = f" {rating:g} out of 5" if rating is not None and self.config.use_ratings else ""
            lines.append(f"- {since}[{title}]{stars}")
        return lines

    def _field(self, item: Mapping[str, Any], name: str) -> str:
        value = item.get(name)
        if isinstance(value, (list, tuple)):
            return " ".join(filter(None, (self._field({name: part}, name) for part in value)))
        return "" if value is None or value != value else str(value)  # NaN is missing


def _label(name: str) -> str:
    return FIELD_LABELS.get(name, name.replace("_", " ").capitalize())
