"""A trained recommender as one folder: weights, tokenizer, prompts, catalogue, item table, protocol and figures."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from r2ec_trl.bundle.card import write_card
from r2ec_trl.bundle.catalogue import Rows, new_rows, with_changes
from r2ec_trl.bundle.format import (
    CARD_FILE,
    ITEMS_FILE,
    TABLE_FILE,
    base_model_hash,
    check_hashes,
    check_output,
    check_parts,
    part_hashes,
    read_bundle,
    read_items,
    read_table,
    table_of,
    upload,
    write_catalogue,
    write_model,
)
from r2ec_trl.bundle.meta import CATALOGUE_FOLDER, OF_CATALOGUE, SEAL, BundleMeta, Protocol, read_meta, write_meta
from r2ec_trl.data.demo import DEMO_POLICY
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import evaluate_users
from r2ec_trl.files import build_folder, lock_folder, remove_folder, remove_leftovers, write_text
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.adapters import adapter_parameters, base_of
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.loading import DEMO, checked_device, dtype_name, quantization_of
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Reasoner, Rollout
from r2ec_trl.vllm.engine import generate_reasoning_vllm

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 600.0  # seconds: another owner may be encoding many items


class Bundle:
    """
    A recommender that is ready to use, and its catalogue, which can be changed without training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, with an adapter or without.
        prompts ([`~r2ec_trl.policy.prompts.Prompts`]), table ([`~r2ec_trl.items.table.ItemTable`]), items:
            Prompt maker, item table encoded with `model`, and the catalogue's rows in the table's order.
        protocol ([`~r2ec_trl.bundle.meta.Protocol`] or `dict`):
            How it answers.
        dataset_card, metrics (`dict`, *optional*):
            Where the users came from, and the figures on the test split.
        model_card (`str`, *optional*):
            TRL's model card, to which the recommendation section is added.
        folder (`Path`, *optional*):
            Where changes of the catalogue are written; without one they stay in memory until [`~Bundle.save`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        table: ItemTable,
        items: Dataset,
        *,
        protocol: Protocol | Mapping[str, Any],
        dataset_card: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        model_card: str | None = None,
        folder: Path | None = None,
    ):
        if items["item_id"][:] != table.item_ids:
            raise UserError("The items are not those of the item table, in its order; encode the table for them.")
        self.model, self.prompts, self.table, self.items = model, prompts, table, items
        self.tokenizer, self.folder, self.model_card = prompts.tokenizer, folder, model_card
        base = base_of(model)
        add_answer_state(base)
        base_name = base.config._name_or_path
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "tokenizers", "r2ec_trl")}
        self.meta = BundleMeta(
            adapter=base is not model,
            base_model=DEMO if base_name == str(DEMO_POLICY) else base_name,
            base_revision=getattr(base.config, "_commit_hash", None),
            dtype=dtype_name(base.dtype),
            attn_implementation=base.config._attn_implementation,
            adapter_dtype=next((dtype_name(p.dtype) for p in adapter_parameters(model)), None),
            quantization=quantization_of(base),
            prompts=prompts.config,
            similarity=table.similarity,
            protocol=Protocol.read(protocol),
            num_items=len(items),
            dataset_card=dict(dataset_card or {}),
            metrics=dict(metrics or {}),
            versions=versions,
        )

    @classmethod
    def load(
        cls,
        name_or_folder: str | os.PathLike,
        model_name_or_path: str | None = None,
        device: str | None = None,
        table_device: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Bundle":
        """
        Read a bundle and check that its parts belong together.

        Args:
            name_or_folder (`str` or `os.PathLike`):
                Folder or hub id. A bundle of the hub is changed in memory only.
            model_name_or_path (`str`, *optional*):
                Base model of the adapter, if the recorded one lies elsewhere now.
            device (`str`, *optional*):
                The GPU if there is one, by default.
            table_device (`str`, *optional*):
                Where the item table lives, beside the model by default; on `"cpu"` it stays memory-mapped.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether code that comes with the base model may run.

        Raises:
            [`UserError`]: when it is no bundle, or its item table was made with other weights, another base model,
            other prompts or another catalogue: the sentence says which.
        """
        on = checked_device(device)
        parts, model, tokenizer = read_bundle(name_or_folder, model_name_or_path, trust_remote_code)
        folder, is_local, meta, items, rows, made_with = parts
        if meta.adapter:
            check_hashes({"base model": base_model_hash(model)}, made_with, folder)
            for parameter in adapter_parameters(model):  # which PEFT loads in float32
                parameter.data = parameter.data.to(getattr(torch, meta.adapter_dtype or "float32"))
        if not meta.quantization:
            model.to(on)
        prompts = Prompts(tokenizer, meta.prompts, items)
        if "rendered prompts" in made_with:
            check_hashes({"rendered prompts": prompts.rendered_fingerprint()}, made_with, folder)
        card = folder / CARD_FILE
        rows = rows.to(checked_device(table_device) if table_device else model.device)
        bundle = cls(
            model.eval(),
            prompts,
            table_of(prompts, items, rows, meta.similarity),
            items,
            protocol=meta.protocol,
            folder=folder if is_local else None,
            model_card=card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None,
        )
        bundle.meta = meta
        return bundle

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Write the whole bundle: beside its place first, then renamed. A bundle that is there is replaced, anything else
        is not, nor its own folder where another has changed it meanwhile. The item table is written as it is: encode
        it with the current weights before.
        """
        folder = Path(folder)
        if not self.meta.base_model and self.meta.adapter:
            raise UserError("The adapter's base has no name to load it by; `save_pretrained` it, and load from there.")
        check_output(folder)
        with lock_folder(folder, LOCK_TIMEOUT) if folder.exists() else nullcontext():
            is_own = self.folder is not None and os.path.realpath(folder) == os.path.realpath(self.folder)
            if is_own and folder.exists() and read_meta(folder).hashes != self.meta.hashes:
                raise UserError(f"The bundle {str(folder)!r} was changed since it was loaded; load it again.")
            with build_folder(folder, replace=folder.exists()) as scratch:
                meta = self._write_parts(scratch)
            if is_own or self.folder is None:  # else it stays that of its own folder
                self.meta = meta
        return folder

    def _write_parts(self, folder: Path) -> BundleMeta:
        meta = dataclasses.replace(self.meta, hashes={})
        write_model(folder, self.model, self.tokenizer, meta)
        made_with = part_hashes(folder, meta) | {"rendered prompts": self.prompts.rendered_fingerprint()}
        if meta.adapter:
            made_with["base model"] = base_model_hash(self.model)
        return self._write_changes(folder, meta, self.items, self.table.rows, made_with)

    def _write_changes(
        self, folder: Path, meta: BundleMeta, items: Dataset, rows: torch.Tensor, made_with: Mapping[str, str]
    ) -> BundleMeta:
        hashes = write_catalogue(folder, items, rows, made_with)
        catalogue = hashes.pop("")
        meta = dataclasses.replace(meta, catalogue=catalogue, hashes=hashes, num_items=len(items)).sealed()
        write_meta(folder, meta)  # from here on it holds
        self._write_card(folder, meta)
        return meta

    def _write_card(self, folder: Path, meta: BundleMeta) -> None:
        try:
            self.model_card = write_card(self.model_card, meta)
            write_text(folder / CARD_FILE, self.model_card)
        except UserError as error:
            logger.warning("The bundle is whole, but its card is not: %s", error)

    def record_metrics(self, metrics: Mapping[str, Any]) -> None:
        """
        Keep figures beside those that the bundle holds, such as `{"before": {...}, "after": {...}}`, and show them on
        its card; [`UserError`] if another process has changed the catalogue that they are of.
        """
        catalogue = self.meta.hashes.get("catalogue")
        with self._changing():
            if self.meta.hashes.get("catalogue") != catalogue:
                raise UserError(
                    f"The catalogue of {str(self.folder)!r} was changed meanwhile, the figures are not its; evaluate "
                    "again."
                )
            if self.folder is not None and SEAL not in self.meta.hashes:  # of format 1: its parts get hashes first
                self._set_catalogue(self.items, self.table.rows, self.prompts)
            meta = dataclasses.replace(self.meta, metrics={**self.meta.metrics, **metrics})
            if self.folder is not None:
                meta = meta.sealed()
                write_meta(self.folder, meta)
                self._write_card(self.folder, meta)
            self.meta = meta

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload the bundle; parts there of the one that it replaces are deleted. Returns the commit's address."""
        if self.folder is None:
            raise UserError(
                "This bundle lies in no local folder; `save` it first and push what `Bundle.load` returns."
            )
        with lock_folder(self.folder, LOCK_TIMEOUT) if os.access(self.folder, os.W_OK) else nullcontext():
            return upload(self.folder, repo_id, private, token)

    def evaluate(
        self, dataset: Dataset, reasoning: str | None = None, rollouts: Sequence[Rollout] | None = None
    ) -> pl.DataFrame:
        """One row a user, by the bundle's own protocol; see [`~r2ec_trl.evaluation.users.evaluate_users`]."""
        protocol = self.meta.protocol
        with self.precision():
            return evaluate_users(
                self.model,
                self.prompts,
                self.table,
                dataset,
                max_new_tokens=protocol.max_completion_length,
                temperature=protocol.item_temperature,
                reasoning=reasoning or protocol.reasoning,
                token_budget=protocol.forward_token_budget,
                rollouts=rollouts,
            )

    def reasoner(self, engine: Any = None) -> Reasoner:
        """What writes the reasonings: a `vllm.LLM` where one is given, else the model itself."""
        reader = MarkerReader(self.tokenizer, self.prompts.config.marker)
        if engine is not None:
            return partial(generate_reasoning_vllm, engine, reader)
        return partial(
            generate_reasoning, self.model, reader, batch_tokens=2 * self.meta.protocol.forward_token_budget
        )

    def settings(self) -> dict[str, Any]:
        """What of the bundle decides a figure: model, prompts, similarity and protocol."""
        meta = self.meta
        similarity = {"model": meta.base_model, "similarity": meta.similarity}
        return {**dataclasses.asdict(meta.prompts), **similarity, **dataclasses.asdict(meta.protocol)}

    def precision(self) -> AbstractContextManager:
        """The autocast of every forward."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.meta.protocol.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.model.device.type, dtype=dtype)

    @torch.no_grad()
    def staleness(self, sample: int = 256) -> dict[str, float]:
        """
        How far the item table lies from what the weights encode now, at `sample` evenly spaced rows: `mean_drift` and
        `max_drift`, where a drift is 1 - cosine(row, row encoded now), and `rows`.
        """
        indices = list(range(0, len(self.table), max(1, -(-len(self.table) // sample))))
        fresh = self._encode([self.table.token_ids[row] for row in indices])
        drift = 1 - torch.nn.functional.cosine_similarity(self.table.rows[indices].double(), fresh.double(), dim=1)
        return {"mean_drift": drift.mean().item(), "max_drift": drift.max().item(), "rows": len(indices)}

    def _encode(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        encoder = make_encoder(self.model, self.prompts, self.meta.protocol.forward_token_budget)
        with torch.no_grad(), self.precision():
            return self.table.project(encoder(sequences)).to(self.table.device)

    def add_items(self, new_items: Rows) -> None:
        """
        Add items; they can be recommended at once. Only they are encoded.

        Args:
            new_items ([`~datasets.Dataset`], `polars.DataFrame` or rows as dicts):
                `item_id`, `title` and any of the catalogue's columns.

        Raises:
            [`UserError`]: for ids that are there already, or columns that the catalogue has not.
        """
        with self._changing():
            new = new_rows(self.items, new_items)
            items = concatenate_datasets([self.items, new])
            prompts = Prompts(self.tokenizer, self.prompts.config, items)
            rows = self._encode(prompts.catalogue_ids(new))
            self._set_catalogue(items, torch.cat([self.table.rows, rows]), prompts)

    def update_items(self, rows: Rows) -> int:
        """
        Change columns of items that are there. Only items whose prompt changes are encoded; their number is returned.

        Args:
            rows ([`~datasets.Dataset`], `polars.DataFrame` or rows as dicts):
                `item_id` and the columns to change.
        """
        with self._changing():
            items, touched = with_changes(self.items, rows)
            prompts = Prompts(self.tokenizer, self.prompts.config, items)
            stale = [row for row in touched if prompts.item_ids(items[row]) != self.prompts.item_ids(self.items[row])]
            table_rows = self.table.rows.clone()
            if stale:
                table_rows[stale] = self._encode([prompts.item_ids(items[row]) for row in stale])
            self._set_catalogue(items, table_rows, prompts)
        return len(stale)

    def remove_items(self, item_ids: Iterable[str]) -> None:
        """Take items out of the catalogue: they are never recommended again. Nothing is encoded."""
        with self._changing():
            gone = set(self.table.row_indices(item_ids))
            keep = [row for row in range(len(self.table)) if row not in gone]
            if len(keep) < 2:
                raise UserError(f"Removing {len(gone)} items leaves {len(keep)}; keep two at least.")
            items = self.items.select(keep)
            self._set_catalogue(items, self.table.rows[keep], Prompts(self.tokenizer, self.prompts.config, items))

    def refresh_table(self) -> None:
        """Encode every item with the weights as they are."""
        with self._changing():
            self._set_catalogue(self.items, self._encode(self.table.token_ids), self.prompts)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The folder, locked; what others have changed of the catalogue since it was read is taken over first."""
        if self.folder is None:
            yield
            return
        with lock_folder(self.folder, LOCK_TIMEOUT):
            remove_leftovers(self.folder)
            meta = read_meta(self.folder)
            if meta.hashes != self.meta.hashes:
                if meta.without_catalogue() != self.meta.without_catalogue():
                    raise UserError(
                        f"The bundle {str(self.folder)!r} was replaced since it was loaded; load it again."
                    )
                check_parts(self.folder, meta)
                self._take(meta, read_items(self.folder / meta.catalogue / ITEMS_FILE))
            yield

    def _set_catalogue(self, items: Dataset, rows: torch.Tensor, prompts: Prompts) -> None:
        """Take a new catalogue and its rows; on disk, replacing bundle.json is the moment at which it holds."""
        if self.folder is None:
            self.meta = dataclasses.replace(self.meta, num_items=len(items), hashes={})  # they are of what was read
            self.items, self.prompts = items, prompts
            self.table = table_of(prompts, items, rows, self.table.similarity)
            return
        recorded = self.meta.hashes
        check_hashes(part_hashes(self.folder, self.meta), recorded, self.folder)
        made_with = {name: value for name, value in recorded.items() if name not in OF_CATALOGUE}
        if SEAL not in recorded:  # of format 1
            made_with |= part_hashes(self.folder, dataclasses.replace(self.meta, hashes={}))
        meta = self._write_changes(self.folder, self.meta, items, rows, made_with)
        self._take(meta, read_items(self.folder / meta.catalogue / ITEMS_FILE))
        for other in self.folder.glob(CATALOGUE_FOLDER.format("*")):
            if other.name != meta.catalogue:
                remove_folder(other)

    def _take(self, meta: BundleMeta, items: Dataset) -> None:
        file = Path(self.folder or "") / meta.catalogue / TABLE_FILE
        rows = read_table(file, is_checked=SEAL in meta.hashes)[0].to(self.table.device)
        self.meta, self.items, self.prompts = meta, items, Prompts(self.tokenizer, meta.prompts, items)
        self.table = table_of(self.prompts, items, rows, meta.similarity)


def save_bundle(
    folder: str | os.PathLike, model: PreTrainedModel, prompts: Prompts, table: ItemTable, items: Dataset, **about: Any
) -> Bundle:
    """Write a trained policy as a bundle; arguments as in [`Bundle`], `table` encoded with `model` as it is now."""
    bundle = Bundle(model, prompts, table, items, **about)
    bundle.folder = bundle.save(folder)
    return bundle
