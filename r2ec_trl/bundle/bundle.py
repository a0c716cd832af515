"""A trained recommender as one folder: weights, tokenizer, prompts, catalogue, item table, protocol and figures."""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from r2ec_trl import __version__
from r2ec_trl.bundle.card import write_card
from r2ec_trl.bundle.catalogue import Rows, new_rows, with_changes
from r2ec_trl.bundle.format import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CARD_FILE,
    CATALOGUE_FOLDER,
    FORMAT,
    ITEMS_FILE,
    META_FILE,
    TABLE_FILE,
    base_model_hash,
    bundle_folder,
    catalogue_name,
    check_hashes,
    file_hashes,
    read_items,
    read_json,
    read_table,
    table_of,
    write_catalogue,
    write_json,
    write_text,
)
from r2ec_trl.data.demo import DEMO_POLICY
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.users import evaluate_users
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy import loading
from r2ec_trl.policy.adapters import adapter_parameters
from r2ec_trl.policy.answer_state import add_answer_state
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.loading import DEMO, PolicyArguments, dtype_name, load_policy, quantization_of
from r2ec_trl.policy.prompts import PromptConfig, Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Reasoner, Rollout
from r2ec_trl.vllm.engine import generate_reasoning_vllm

PROTOCOL_KEYS = ("reasoning", "max_new_tokens", "item_temperature", "token_budget")


class Bundle:
    """
    A recommender that is ready to use, and its catalogue, which can be changed without training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, with an adapter or without.
        prompts ([`~r2ec_trl.policy.prompts.Prompts`]), table ([`~r2ec_trl.items.table.ItemTable`]), items:
            Prompt maker, item table encoded with `model`, and the catalogue's rows in the table's order.
        protocol (`dict`):
            At least `reasoning` (`"full"` or `"none"`), `max_new_tokens`, `item_temperature` and `token_budget`; with
            `mixed_precision` `"bf16"` or `"fp16"`, forwards run under that autocast.
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
        protocol: Mapping[str, Any],
        dataset_card: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        model_card: str | None = None,
        folder: Path | None = None,
    ):
        missing = [key for key in PROTOCOL_KEYS if key not in protocol]
        if missing:
            raise UserError(f"The bundle's protocol lacks {', '.join(missing)}; give {', '.join(PROTOCOL_KEYS)}.")
        if items["item_id"][:] != table.item_ids:
            raise UserError("The items are not those of the item table, in its order; encode the table for them.")
        self.model, self.prompts, self.table, self.items = model, prompts, table, items
        self.tokenizer = prompts.tokenizer
        self.folder = folder
        self.model_card = model_card
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_answer_state(base)
        base_name = base.config._name_or_path
        self.meta: dict[str, Any] = {
            "format": FORMAT,
            "adapter": base is not model,
            "base_model": DEMO if base_name == str(DEMO_POLICY) else base_name,
            "base_revision": getattr(base.config, "_commit_hash", None),  # of a model from the hub
            "dtype": dtype_name(base.dtype),
            "attn_implementation": base.config._attn_implementation,
            "adapter_dtype": next((dtype_name(p.dtype) for p in adapter_parameters(model)), None),
            "quantization": quantization_of(base),
            "prompts": dataclasses.asdict(prompts.config),
            "similarity": table.similarity,
            "protocol": dict(protocol),
            "num_items": len(items),
            "dataset_card": dict(dataset_card or {}),
            "metrics": dict(metrics or {}),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "tokenizers")}
            | {"r2ec_trl": __version__},
        }

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
        folder, is_local = bundle_folder(name_or_folder)
        meta = read_json(folder / META_FILE)
        if meta.get("format") != FORMAT:
            raise UserError(
                f"The bundle {str(folder)!r} has format {meta.get('format')}; this version reads {FORMAT}."
            )
        try:
            prompt_config = PromptConfig(**meta["prompts"])
            catalogue = folder / catalogue_name(meta["catalogue"])
            protocol, adapter, similarity = meta["protocol"], meta["adapter"], meta["similarity"]
            quantization, dtype, base_model = meta["quantization"], meta["dtype"], meta["base_model"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / META_FILE} lacks or misspells a key: {error}.") from error
        items = read_items(catalogue / ITEMS_FILE)
        rows, recorded = read_table(catalogue / TABLE_FILE)
        check_hashes(file_hashes(folder, prompt_config, items), recorded, folder)
        if not adapter and model_name_or_path is not None:
            raise UserError(f"The bundle {str(folder)!r} holds full weights; leave `model_name_or_path` out.")
        args = PolicyArguments(
            model_name_or_path=(model_name_or_path or base_model) if adapter else str(folder),
            adapter=str(folder) if adapter else None,
            dtype=dtype,
            model_revision=(model_name_or_path is None and meta.get("base_revision")) or "main",
            attn_implementation=loading.available_attention(meta.get("attn_implementation")),
            **quantization,
        )
        model, tokenizer = load_policy(args, trust_remote_code=trust_remote_code, tokenizer_path=str(folder))
        if adapter:
            check_hashes({"base model": base_model_hash(model)}, recorded, folder)
            for parameter in adapter_parameters(model):  # which PEFT loads in float32
                parameter.data = parameter.data.to(getattr(torch, meta.get("adapter_dtype") or "float32"))
        if not quantization:
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        prompts = Prompts(tokenizer, prompt_config, items)
        card = folder / CARD_FILE
        bundle = cls(
            model.eval(),
            prompts,
            table_of(prompts, items, rows.to(table_device or model.device), similarity),
            items,
            protocol=protocol,
            folder=folder if is_local else None,
            model_card=card.read_text(encoding="utf-8") if card.is_file() else None,
        )
        bundle.meta = meta
        return bundle

    def save(self, folder: str | os.PathLike) -> Path:
        """
        Write the whole bundle: under a temporary name first, then renamed. A bundle that is there is replaced,
        anything else is not. The item table is written as it is: encode it with the current weights before.
        """
        folder = Path(folder)
        if not self.meta["base_model"] and self.meta["adapter"]:
            raise UserError(
                "The adapter's base has no name to load it by; `save_pretrained` it, and load it from there."
            )
        if folder.exists() and not (folder / META_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{str(folder)!r} exists and is no bundle; choose another folder for it.")
        temporary = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._write_parts(temporary)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
                os.rename(folder, old)
                os.rename(temporary, folder)
                shutil.rmtree(old)
            else:
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _write_parts(self, folder: Path) -> None:
        if self.meta["adapter"]:
            self.model.save_pretrained(folder, selected_adapters=["default"])
            config = read_json(folder / ADAPTER_CONFIG)
            write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": self.meta["base_model"]})
            if not (folder / ADAPTER_FILE).is_file():
                raise UserError(f"PEFT wrote no {ADAPTER_FILE}; a bundle holds one adapter named 'default'.")
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        hashes = file_hashes(folder, self.prompts.config, self.items)
        if self.meta["adapter"]:
            hashes["base model"] = base_model_hash(self.model)
        name = write_catalogue(folder, self.items, self.table.rows, hashes)
        self.meta.update(catalogue=name, hashes=hashes, num_items=len(self.items))
        self._write_meta(folder)

    def _write_meta(self, folder: Path) -> None:
        write_json(folder / META_FILE, self.meta)
        self.model_card = write_card(self.model_card, self.meta)
        write_text(folder / CARD_FILE, self.model_card)

    def record_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Keep figures with the bundle, such as `{"before": {...}, "after": {...}}`, and show them on its card."""
        self.meta["metrics"] = dict(metrics)
        if self.folder is not None:
            self._write_meta(self.folder)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload the bundle; a catalogue that it replaced is deleted there. Returns the commit's address."""
        if self.folder is None:
            raise UserError(
                "This bundle lies in no local folder; `save` it first and push what `Bundle.load` returns."
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=self.folder,
            commit_message="Upload recommender",
            ignore_patterns=[".*"],
            delete_patterns=[CATALOGUE_FOLDER.format("*/*")],
        )
        return str(commit)

    def evaluate(
        self, dataset: Dataset, reasoning: str | None = None, rollouts: Sequence[Rollout] | None = None
    ) -> pl.DataFrame:
        """One row a user, by the bundle's own protocol; see [`~r2ec_trl.evaluation.users.evaluate_users`]."""
        protocol = self.meta["protocol"]
        with self.precision():
            return evaluate_users(
                self.model,
                self.prompts,
                self.table,
                dataset,
                max_new_tokens=protocol["max_new_tokens"],
                temperature=protocol["item_temperature"],
                reasoning=reasoning or protocol["reasoning"],
                token_budget=protocol["token_budget"],
                rollouts=rollouts,
            )

    def reasoner(self, engine: Any = None) -> Reasoner:
        """What writes the reasonings: a `vllm.LLM` where one is given, else the model itself."""
        reader = MarkerReader(self.tokenizer, self.prompts.config.marker)
        if engine is not None:
            return partial(generate_reasoning_vllm, engine, reader)
        budget = 2 * self.meta["protocol"]["token_budget"]
        return partial(generate_reasoning, self.model, reader, batch_tokens=budget)

    def settings(self) -> dict[str, Any]:
        """What of the bundle decides a figure: model, prompts, similarity and protocol."""
        similarity = {"model": self.meta["base_model"], "similarity": self.meta["similarity"]}
        return {**self.meta["prompts"], **similarity, **self.meta["protocol"]}

    def precision(self) -> AbstractContextManager:
        """The context of every forward: the autocast that the bundle's protocol names."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.meta["protocol"].get("mixed_precision", "no"))
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
        encoder = make_encoder(self.model, self.prompts, self.meta["protocol"]["token_budget"])
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
        gone = set(self.table.row_indices(item_ids))
        keep = [row for row in range(len(self.table)) if row not in gone]
        if len(keep) < 2:
            raise UserError(f"Removing {len(gone)} of {len(self.table)} items leaves {len(keep)}; keep two at least.")
        items = self.items.select(keep)
        self._set_catalogue(items, self.table.rows[keep], Prompts(self.tokenizer, self.prompts.config, items))

    def refresh_table(self) -> None:
        """Encode every item with the weights as they are."""
        self._set_catalogue(self.items, self._encode(self.table.token_ids), self.prompts)

    def _set_catalogue(self, items: Dataset, rows: torch.Tensor, prompts: Prompts) -> None:
        """Take a new catalogue and its rows; on disk, replacing bundle.json is the moment at which it holds."""
        if self.folder is not None:
            recorded = self.meta["hashes"]
            current = file_hashes(self.folder, self.prompts.config, items)
            check_hashes({**current, "catalogue": recorded["catalogue"]}, recorded, self.folder)
            hashes = {**recorded, "catalogue": current["catalogue"]}
            name = write_catalogue(self.folder, items, rows, hashes)
            self.meta.update(catalogue=name, hashes=hashes, num_items=len(items))
            self._write_meta(self.folder)
            for other in self.folder.glob(CATALOGUE_FOLDER.format("*")):  # the old one, and what a crash left
                if other.name != name:
                    shutil.rmtree(other)
            items = read_items(self.folder / name / ITEMS_FILE)
            rows = read_table(self.folder / name / TABLE_FILE)[0].to(self.table.device)
        self.meta["num_items"] = len(items)
        self.items, self.prompts = items, prompts
        self.table = table_of(prompts, items, rows, self.table.similarity)


def save_bundle(
    folder: str | os.PathLike, model: PreTrainedModel, prompts: Prompts, table: ItemTable, items: Dataset, **about: Any
) -> Bundle:
    """Write a trained policy as a bundle; arguments as in [`Bundle`], `table` encoded with `model` as it is now."""
    bundle = Bundle(model, prompts, table, items, **about)
    bundle.folder = bundle.save(folder)
    return bundle
