"""Recommendations for any user from a bundle: histories by item id or by title, filters, the reasoning beside them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.errors import UserError
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.scoring import exclusion_matrix, top_k
from r2ec_trl.policy.rollouts import MarkerReader, Rollout, generate_reasoning
from r2ec_trl.serving.where import matching_rows
from r2ec_trl.vllm.engine import generate_reasoning_vllm

History: TypeAlias = "Sequence[str] | Mapping[str, Any]"

_KEYS = ("user_id", "history", "history_titles", "history_ratings", "history_timestamps", "timestamp")


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
    """

    items: list[RecommendedItem]
    reasoning: str
    has_marker: bool
    user_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return dataclasses.asdict(self)


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

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike, *args: Any, **kwargs: Any) -> "Recommender":
        """Arguments as in [`~r2ec_trl.bundle.bundle.Bundle.load`]."""
        return cls(Bundle.load(name_or_folder, *args, **kwargs))

    @torch.no_grad()
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
            [`UserError`]: for an empty or unknown history, unknown items or columns, a condition that is none.
        """
        if k < 1:
            raise UserError(f"`k` is {k}; ask for one item at least.")
        if isinstance(histories, (str, Mapping)):
            raise UserError("`histories` holds one entry a user; put a single user into a list.")
        if not len(histories):
            return []
        table = self.bundle.table
        users = [self._user(history, number) for number, history in enumerate(histories)]
        allowed = self._allowed(where, allow, exclude)
        with self.bundle.precision():
            states, rollouts = self._states(
                users, self.bundle.meta["protocol"]["reasoning"] if reasoning is None else reasoning
            )
        excluded = exclusion_matrix([user["rows"] if exclude_history else [] for user in users], table.device)
        scores, best = top_k(states, table.rows, k, excluded=excluded, allowed=allowed)
        titles = self.bundle.prompts.titles
        marker = self.bundle.prompts.config.marker
        texts = self.bundle.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
        return [
            Recommendation(
                items=[
                    RecommendedItem(table.item_ids[row], titles[table.item_ids[row]], score)
                    for row, score in zip(rows, values, strict=True)
                    if row >= 0
                ],
                reasoning=text.split(marker)[0].strip(),
                has_marker=rollout.has_marker,
                user_id=user.get("user_id"),
            )
            for user, rollout, text, rows, values in zip(
                users, rollouts, texts, best.tolist(), scores.tolist(), strict=True
            )
        ]

    def _states(
        self, users: Sequence[Mapping[str, Any]], reasoning: str | Sequence[str]
    ) -> tuple[torch.Tensor, list[Rollout]]:
        """Answer states, `(users, d)`, and the rollouts they were read after."""
        bundle, protocol = self.bundle, self.bundle.meta["protocol"]
        reader = MarkerReader(bundle.tokenizer, bundle.prompts.config.marker)
        prompt_ids = [bundle.prompts.user_ids(user) for user in users]
        if reasoning == "full" and self.engine is not None:
            rollouts = generate_reasoning_vllm(self.engine, reader, prompt_ids, protocol["max_new_tokens"])
        elif reasoning == "full":
            rollouts = generate_reasoning(
                bundle.model, reader, prompt_ids, protocol["max_new_tokens"], 2 * protocol["token_budget"]
            )
        else:
            texts = [reasoning] * len(users) if isinstance(reasoning, str) else list(reasoning)
            if len(texts) != len(users):
                raise UserError(
                    f"There are {len(texts)} reasonings for {len(users)} users; give one text, or one each."
                )
            texts = ["" if text == "none" else text for text in texts]
            given = [bundle.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            rollouts = [reader.finish(ids, end_ids=[]) for ids in given]
        sequences = [list(ids) + rollout.ids for ids, rollout in zip(prompt_ids, rollouts, strict=True)]
        states = make_encoder(bundle.model, bundle.prompts, protocol["token_budget"])(sequences)
        return bundle.table.project(states).to(bundle.table.device), rollouts

    def _user(self, history: History, number: int) -> dict[str, Any]:
        """A prompt's example, with the catalogue rows of its purchases under `rows`."""
        user: dict[str, Any] = dict(history) if isinstance(history, Mapping) else {"history": list(history)}
        name = f"User {user.get('user_id', number)}"
        unknown = [key for key in user if key not in _KEYS and key not in ("target",)]
        if unknown:
            raise UserError(f"{name} has the key {unknown[0]!r}; give {', '.join(_KEYS)}.")
        if ("history" in user) == ("history_titles" in user):
            raise UserError(f"{name}: give either `history` (item ids) or `history_titles`.")
        key = "history" if "history" in user else "history_titles"
        purchases = user[key]
        if isinstance(purchases, str) or not all(isinstance(purchase, str) for purchase in purchases):
            raise UserError(f"{name}: `{key}` must be a list of texts.")
        if not purchases:
            raise UserError(f"{name} has an empty history; give at least one purchase.")
        for column in ("history_ratings", "history_timestamps"):
            if user.get(column) is not None and len(user[column]) != len(purchases):
                raise UserError(f"{name} has {len(purchases)} purchases, but {len(user[column])} `{column}`.")
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
        table = self.bundle.table
        refused = list(exclude)
        if where is None and allow is None and not refused:
            return None
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


def _folded(title: str) -> str:
    return " ".join(title.split()).casefold()
