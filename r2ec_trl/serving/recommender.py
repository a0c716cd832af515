"""Recommendations for any user from a bundle: histories by item id or by title, filters, the reasoning beside them."""

import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import answer_users
from r2ec_trl.items.scoring import exclusion_matrix, top_k
from r2ec_trl.policy.rollouts import Rollout, Watch
from r2ec_trl.serving.users import History, check_user, is_text
from r2ec_trl.serving.where import matching_rows

_MASKS = 16  # filters kept for the next question that has the same


@dataclass(frozen=True)
class RecommendedItem:
    """
    One recommendation.

    Args:
        item_id (`str`), title (`str`):
            The item.
        score (`float`):
            Similarity of the answer state and the item's row.
    """

    item_id: str
    title: str
    score: float


@dataclass(frozen=True)
class Recommendation:
    """
    What one user gets.

    Args:
        items (`list[RecommendedItem]`):
            Best first; fewer than asked for where filters leave fewer.
        reasoning (`str`):
            What the model wrote before the marker, or was given.
        has_marker (`bool`):
            Whether the model ended its reasoning itself; otherwise it was cut.
        user_id (`str`, *optional*):
            As given.
        reasoning_tokens (`int`):
            Tokens of the reasoning, a marker that the model wrote included.
    """

    items: list[RecommendedItem]
    reasoning: str
    has_marker: bool
    user_id: str | None = None
    reasoning_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Question:
    """
    One user as [`Recommender.prepare`] has checked them, for [`Recommender.answer`].

    Args:
        user (`dict`):
            The prompt's example, with the catalogue rows of its purchases under `rows`.
        k (`int`), exclude_history (`bool`):
            As in [`Recommender.recommend`].
        reasoning (`str` or [`~r2ec_trl.policy.rollouts.Rollout`]):
            `"full"`, `"none"` or a text; or the rollout, where another has written it.
        allowed (`torch.Tensor` of shape `(N,)`, *optional*):
            Items that may be recommended.
    """

    user: Mapping[str, Any]
    k: int
    exclude_history: bool
    reasoning: str | Rollout
    allowed: torch.Tensor | None


class Recommender:
    """
    Recommends from a bundle.

    Args:
        bundle ([`~r2ec_trl.bundle.bundle.Bundle`]):
            Model, prompts, catalogue and item table. Its catalogue may change between calls.
        engine (`vllm.LLM`, *optional*):
            Writes the reasonings in place of the model itself; from [`~r2ec_trl.vllm.engine.load_engine`].

    Example:

    ```python
    recommender = Recommender.from_pretrained("outputs/demo/bundle")
    [user] = recommender.recommend([["i1", "i2"]], k=5, where="price < 50")
    print(user.reasoning, [item.title for item in user.items])
    ```
    """

    def __init__(self, bundle: Bundle, engine: Any = None):
        self.bundle = bundle
        self.engine = engine
        self._titles_of: Any = None  # the catalogue whose titles `_by_title` holds
        self._by_title: dict[str, list[int]] = {}
        self._masks_of: Any = None  # the catalogue that `_masks` filters
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike, *args: Any, **kwargs: Any) -> "Recommender":
        """Arguments as in [`~r2ec_trl.bundle.bundle.Bundle.load`]."""
        return cls(Bundle.load(name_or_folder, *args, **kwargs))

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        exclude_history: bool = True,
        reasoning: str | Sequence[str] | None = None,
        where: str | None = None,
        allow: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
    ) -> list[Recommendation]:
        """
        Reason about each user, then take the best items of the whole catalogue.

        Args:
            histories (`Sequence`):
                One entry a user, oldest purchase first: item ids, or a dict with `history` (item ids) or
                `history_titles` (titles, also of items outside the catalogue) and optionally `history_ratings`,
                `history_timestamps`, `timestamp` (seconds) and `user_id`.
            k (`int`, *optional*, defaults to `10`):
                Items a user.
            exclude_history (`bool`, *optional*, defaults to `True`):
                Leave out what the user has bought. Purchases given by title count where the catalogue has that title.
            reasoning (`str` or `Sequence[str]`, *optional*):
                `"full"`: the model reasons; `"none"`: it answers at once; any other text is taken as the reasoning, a
                list as one for each user. By default as the bundle was evaluated.
            where (`str`, *optional*):
                SQL condition on the catalogue's columns, such as `"price < 50 AND brand = 'Fenta'"`. Items for which
                it is unknown (no price) are left out.
            allow (`Iterable[str]`, *optional*):
                Recommend only these item ids.
            exclude (`Iterable[str]`, *optional*):
                Never recommend these item ids.

        Returns:
            `list[Recommendation]`: in the order of `histories`.

        Raises:
            [`UserError`]: for an unknown history, unknown items or columns, a condition that is none.
        """
        if isinstance(histories, (str, Mapping)):
            raise UserError("`histories` holds one entry a user; put a single user into a list.")
        one = isinstance(reasoning, str) or not isinstance(reasoning, Iterable)
        texts: Sequence[Any] = [reasoning] * len(histories) if one else list(reasoning or ())
        if len(texts) != len(histories):
            raise UserError(
                f"There are {len(texts)} reasonings for {len(histories)} users; give one text, or one each."
            )
        options: dict[str, Any] = {"exclude_history": exclude_history, "where": where}
        options |= {"allow": None if allow is None else _ids("allow", allow), "exclude": _ids("exclude", exclude)}
        pairs = enumerate(zip(histories, texts, strict=True))
        return self.answer([self.prepare(user, k, reasoning=text, name=i, **options) for i, (user, text) in pairs])

    def prepare(
        self,
        history: History,
        k: int = 10,
        *,
        exclude_history: bool = True,
        reasoning: str | None = None,
        where: str | None = None,
        allow: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        name: int = 0,
    ) -> Question:
        """
        Check one user's question, so that [`Recommender.answer`] can take many together, each with its own options.

        Args:
            history, k, exclude_history, reasoning, where, allow, exclude:
                As in [`Recommender.recommend`], of one user.
            name (`int`, *optional*, defaults to `0`):
                What a sentence calls a user without `user_id`.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise UserError(f"`k` is {k!r}; ask for one item at least, as a whole number.")
        mode = self.bundle.meta.protocol.reasoning if reasoning is None else reasoning
        if not is_text(mode):
            raise UserError(f"`reasoning` is {mode!r:.80}; give 'full', 'none' or a text.")
        return Question(self._user(history, name), k, exclude_history, mode, self._allowed(where, allow, exclude))

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], watch: Watch | None = None) -> list[Recommendation]:
        """
        Answer questions together: one batch of reasonings, one forward, one product with the item table.

        Args:
            questions (`Sequence[Question]`):
                Of this bundle's catalogue as it is now.
            watch (`Callable`, *optional*):
                Called with a question's number and its reasoning's token ids so far, as they are written; `True` ends
                that reasoning.

        Returns:
            `list[Recommendation]`: in the order of `questions`.
        """
        if not questions:
            return []
        bundle, table, titles = self.bundle, self.bundle.table, self.bundle.prompts.titles
        with bundle.precision():
            states, rollouts = answer_users(
                bundle.model,
                bundle.prompts,
                table,
                [question.user for question in questions],
                bundle.reasoner(self.engine),
                bundle.meta.protocol.max_completion_length,
                bundle.meta.protocol.forward_token_budget,
                [question.reasoning for question in questions],
                watch,
            )
        groups: dict[int, list[int]] = {}  # questions whose filter is the same tensor
        for number, question in enumerate(questions):
            groups.setdefault(id(question.allowed), []).append(number)
        items: dict[int, list[RecommendedItem]] = {}
        for numbers in groups.values():
            asked = [questions[number] for number in numbers]
            excluded = exclusion_matrix([q.user["rows"] if q.exclude_history else [] for q in asked], table.device)
            k = max(question.k for question in asked)
            scores, best = top_k(states[numbers], table.rows, k, excluded=excluded, allowed=asked[0].allowed)
            for number, question, rows, values in zip(numbers, asked, best.tolist(), scores.tolist(), strict=True):
                found = [(table.item_ids[row], value) for row, value in zip(rows, values, strict=True) if row >= 0]
                items[number] = [RecommendedItem(one, titles[one], value) for one, value in found[: question.k]]
        texts = bundle.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
        marker = bundle.prompts.config.marker
        return [
            Recommendation(
                items[i],
                text.split(marker)[0].strip(),
                rollout.has_marker,
                question.user.get("user_id"),
                sum(rollout.trained),
            )
            for i, (question, rollout, text) in enumerate(zip(questions, rollouts, texts, strict=True))
        ]

    def _user(self, history: History, number: int) -> dict[str, Any]:
        """A prompt's example, with the catalogue rows of its purchases under `rows`."""
        name = f"User {history.get('user_id', number)!s:.80}" if isinstance(history, Mapping) else f"User {number}"
        user = check_user(history, name)
        key = "history" if "history" in user else "history_titles"
        purchases = user[key]
        index = self.bundle.table.index
        if key == "history":
            for item_id in purchases:
                if item_id not in index:
                    raise UserError(
                        f"{name} bought {item_id!r}, which is not in the catalogue of {len(index)} items; give what "
                        "lies outside it as `history_titles`."
                    )
            user["rows"] = [index[item_id] for item_id in purchases]
        else:
            by_title = self._rows_by_title()
            user["rows"] = [row for title in purchases for row in by_title.get(_folded(title), [])]
        return user

    def _rows_by_title(self) -> dict[str, list[int]]:
        """Rows of each title; made once for a catalogue."""
        items = self.bundle.items
        if self._titles_of is not items:
            self._titles_of, self._by_title = items, {}
            for row, title in enumerate(items["title"][:]):
                self._by_title.setdefault(_folded(title), []).append(row)
        return self._by_title

    def _allowed(self, where: str | None, allow: Iterable[str] | None, exclude: Iterable[str]) -> torch.Tensor | None:
        """Mask of the items that may be recommended, `(N,)`; `None` for all."""
        key = (where, allow if allow is None else _ids("allow", allow), _ids("exclude", exclude))
        if key == (None, None, ()):
            return None
        if self._masks_of is not self.bundle.items or len(self._masks) >= _MASKS:
            self._masks_of, self._masks = self.bundle.items, {}
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def _mask(self, where: str | None, allow: Sequence[str] | None, refused: Sequence[str]) -> torch.Tensor:
        table = self.bundle.table
        mask = torch.ones(len(table), dtype=torch.bool)
        if allow is not None:
            mask.zero_()
            mask[table.row_indices(allow)] = True
        mask[table.row_indices(refused)] = False
        if where is not None:
            mask &= torch.tensor(matching_rows(self.bundle.items.to_polars(), where))
        if not mask.any():
            raise UserError("No item is left to recommend: `where`, `allow` and `exclude` leave none; loosen them.")
        return mask.to(table.device)


def _ids(name: str, item_ids: Iterable[str]) -> tuple[str, ...]:
    is_list = isinstance(item_ids, Iterable) and not isinstance(item_ids, str)
    given: tuple[Any, ...] = tuple(item_ids) if is_list else (item_ids,)
    if not is_list or not all(isinstance(one, str) for one in given):
        raise UserError(
            f"`{name}` is {(given if is_list else item_ids)!r:.80}; give a list of item ids, all of them texts."
        )
    return given


def _folded(title: str) -> str:
    return unicodedata.normalize("NFC", " ".join(title.split()).casefold())  # é as one character, or as two
