"""The item table H_V: one row per item, the policy's own encoding of the item's prompt (paper §3)."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from r2ec_trl.errors import UserError, first_line
from r2ec_trl.files import write_text, write_with
from r2ec_trl.items.scoring import CatalogueScores, normalise, target_rank_and_logprob, top_k
from r2ec_trl.policy.settings import SIMILARITIES

Encoder = Callable[[Sequence[Sequence[int]]], torch.Tensor]


class ItemTable:
    """
    Rows of the recommendation head. It is no `nn.Module` and owns no parameter: its rows are always encodings.

    Args:
        item_ids (`Sequence[str]`):
            Item ids, one a row, unique.
        token_ids (`Sequence[Sequence[int]]`):
            Item prompts, each ending with the marker.
        similarity (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"` (rows are kept normalised) or `"dot"`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the rows live.

    Attributes:
        rows (`torch.Tensor` of shape `(N, d)`): float32 rows; [`UserError`] before the first [`~ItemTable.refresh`].
        index (`dict[str, int]`): row of each item id.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        similarity: str = "cosine",
        device: torch.device | str = "cpu",
    ):
        if similarity not in SIMILARITIES:
            raise UserError(f"`similarity` is {similarity!r}; give 'cosine' or 'dot'.")
        self.item_ids = list(item_ids)
        self.token_ids = [list(ids) for ids in token_ids]
        self.similarity = similarity
        self.device = torch.device(device)
        self.index = {item_id: row for row, item_id in enumerate(self.item_ids)}
        if len(self.index) != len(self.item_ids):
            repeated = next(item_id for row, item_id in enumerate(self.item_ids) if self.index[item_id] != row)
            raise UserError(f"Item id {repeated!r} is in the catalogue twice; keep one row an item.")
        if len(self.item_ids) < 2:
            raise UserError(f"The catalogue holds {len(self.item_ids)} item(s); a recommender needs at least two.")
        self._rows: torch.Tensor | None = None
        self._next = 0  # where the round-robin goes on

    @classmethod
    def from_rows(
        cls, item_ids: Sequence[str], token_ids: Sequence[Sequence[int]], rows: torch.Tensor, similarity: str
    ) -> "ItemTable":
        """A table of rows encoded before, `(N, d)`; `token_ids` is kept as it is and may make prompts when asked."""
        table = cls(item_ids, (), similarity, rows.device)
        if not len(item_ids) == len(token_ids) == len(rows):
            raise UserError(f"{len(item_ids)} item ids, but {len(rows)} rows; encode the table for this catalogue.")
        table.token_ids, table._rows = token_ids, rows  # type: ignore[assignment]
        return table

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def rows(self) -> torch.Tensor:
        """The rows, `(N, d)` float32, normalised when the similarity is cosine."""
        if self._rows is None:
            raise UserError("The item table is empty; call `refresh` with an encoder first.")
        return self._rows

    @property
    def is_empty(self) -> bool:
        """Whether no row was encoded yet."""
        return self._rows is None

    @property
    def num_bytes(self) -> int:
        """Memory of the rows that this process could save; 0 before the first refresh."""
        return 0 if self._rows is None else self._rows.numel() * self._rows.element_size()

    @property
    def num_tokens(self) -> int:
        """Tokens of all item prompts: what a full refresh forwards."""
        return sum(len(ids) for ids in self.token_ids)

    @property
    def text_hash(self) -> str:
        """SHA-256 (hex) over ids and prompts: equal for the same catalogue under the same prompt and tokenizer."""
        digest = hashlib.sha256()
        for item_id, ids in zip(self.item_ids, self.token_ids, strict=True):
            digest.update(json.dumps([item_id, ids]).encode())
        return digest.hexdigest()

    def row_indices(self, item_ids: Iterable[str]) -> list[int]:
        """Rows of item ids; [`UserError`] names the first one outside the catalogue."""
        rows = []
        if isinstance(item_ids, str):  # else each of its letters would be an id
            raise UserError(f"{item_ids!r:.80} is no list; give a list of item ids.")
        for item_id in item_ids:
            if not isinstance(item_id, str) or item_id not in self.index:
                raise UserError(f"Item {item_id!r} is not in the catalogue of {len(self)} items.")
            rows.append(self.index[item_id])
        return rows

    @torch.no_grad()
    def refresh(self, encoder: Encoder, indices: Sequence[int] | None = None) -> None:
        """
        Re-encode rows with the current weights.

        Args:
            encoder (`Callable`):
                Token sequences → states `(n, d)`, such as a partial of
                [`~r2ec_trl.policy.answer_state.encode_states`].
            indices (`Sequence[int]`, *optional*):
                Rows to encode; all of them by default, and always the first time.
        """
        if indices is None or self._rows is None:
            self._rows = self.encoded(encoder, range(len(self)))
        elif len(indices):
            self.put(indices, self.encoded(encoder, indices))

    def encoded(self, encoder: Encoder, indices: Sequence[int]) -> torch.Tensor:
        """Rows as they are now, `(n, d)`; [`UserError`] for one that is no finite numbers and would fall silent."""
        states = self.project(encoder([self.token_ids[row] for row in indices])).to(self.device)
        if broken := (~states.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
            raise UserError(
                f"The model's state for item {self.item_ids[indices[broken[0]]]!r} is not finite ({len(broken):,} of "
                f"{len(indices):,}); its weights are damaged, or overflow in float16: use `dtype` bfloat16 or float32."
            )
        return states

    def clear(self) -> None:
        """Forget the rows: the next [`~ItemTable.refresh`] encodes all of them."""
        self._rows = None

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """A copy of some rows, `(n, d)`."""
        return self.rows[torch.as_tensor(indices, device=self.device)]

    def put(self, indices: Sequence[int], rows: torch.Tensor) -> None:
        """Overwrite some rows."""
        self.rows[torch.as_tensor(indices, device=self.device)] = rows.to(self.device)

    def rank(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float,
        excluded: torch.Tensor | None = None,
        keep_target: bool = True,
    ) -> CatalogueScores:
        """[`~r2ec_trl.items.scoring.target_rank_and_logprob`] over these rows."""
        return target_rank_and_logprob(
            states, self.rows, targets, temperature=temperature, excluded=excluded, keep_target=keep_target
        )

    def best(
        self, states: torch.Tensor, k: int, *, excluded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`~r2ec_trl.items.scoring.top_k`] over these rows."""
        return top_k(states, self.rows, k, excluded=excluded)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """States as the table scores them: float32, normalised when the similarity is cosine."""
        return normalise(states, self.similarity)

    def next_slice(self, token_budget: int) -> list[int]:
        """
        The next rows in round-robin order whose prompts take at most `token_budget` tokens (all, at most). Of a budget
        above 0 at least one: a prompt longer than it would hold up the round for good.
        """
        rows: list[int] = []
        while token_budget > 0 and len(rows) < len(self):
            token_budget -= len(self.token_ids[self._next])
            if token_budget < 0 and rows:
                break
            rows.append(self._next)
            self._next = (self._next + 1) % len(self)
        return rows

    def whole(self) -> "ItemTable | None":
        """The table with all its rows, to be written: itself. A sliced one is put together on the main process."""
        return self

    def save(self, folder: str | os.PathLike) -> None:
        """Write `item_table.safetensors` and `item_table.json` into a folder, each whole or not at all."""
        folder = Path(folder)
        meta = {
            "item_ids": self.item_ids,
            "similarity": self.similarity,
            "text_hash": self.text_hash,
            "next_row": self._next,
        }
        rows = {"rows": self.rows.contiguous().cpu()}
        write_with(folder / "item_table.safetensors", lambda file: save_file(rows, file))
        write_text(folder / "item_table.json", json.dumps(meta))

    def load(self, folder: str | os.PathLike) -> None:
        """
        Read rows that [`~ItemTable.save`] wrote for the same catalogue, prompt and tokenizer.

        Raises:
            [`UserError`]: when there are none, or they belong to another catalogue, prompt or similarity.
        """
        folder = Path(folder)
        for name in ("item_table.json", "item_table.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} holds no item table ({name}); encode the catalogue and save it.")
        try:
            meta = json.loads((folder / "item_table.json").read_text())
            same = meta["text_hash"] == self.text_hash and meta["similarity"] == self.similarity
            rows, following = load_file(folder / "item_table.safetensors")["rows"], int(meta.get("next_row", 0))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"The item table in {folder} is damaged ({first_line(error)}); encode it anew.") from error
        if not same:
            raise UserError(
                f"The item table in {folder} belongs to another catalogue, prompt or similarity; encode it anew."
            )
        if len(rows) != len(self) or not rows.isfinite().all() or not 0 <= following < len(self):
            raise UserError(f"The item table in {folder} is damaged (its rows); encode it anew.")
        self._rows, self._next = rows.to(self.device), following
