"""The parts of a bundle on disk, and the hashes that tell whether an item table belongs to the others."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.schema import arrow_batches
from r2ec_trl.errors import UserError
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.adapters import is_packed
from r2ec_trl.policy.prompts import PromptConfig, Prompts

META_FILE, ITEMS_FILE, TABLE_FILE = "bundle.json", "items.parquet", "item_table.safetensors"
CATALOGUE_FOLDER = "catalogue-{}"  # with the start of a hash: a change of the catalogue commits by replacing META_FILE
CARD_FILE = "README.md"
FORMAT = 1
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_SAMPLED_VALUES = 64  # of each tensor of a base model: its hash should cost nothing


def bundle_folder(name_or_folder: str | os.PathLike) -> tuple[Path, bool]:
    """Local folder of a bundle, downloaded if it is a hub id, and whether it was local."""
    folder, is_local = Path(name_or_folder), True
    if not folder.is_dir():
        try:
            folder, is_local = Path(snapshot_download(str(name_or_folder))), False
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"The bundle {str(name_or_folder)!r} is neither a folder nor a hub id that can be reached: "
                f"{_first_line(error)}"
            ) from error
    if not (folder / META_FILE).is_file():
        inside = folder / "bundle"
        hint = str(inside) if (inside / META_FILE).is_file() else "the folder `bundle` that recipes/recpo.py wrote"
        raise UserError(f"{str(name_or_folder)!r} has no {META_FILE}; give {hint}.")
    return folder, is_local


def weights_hash(folder: Path) -> str:
    """SHA-256 of a bundle's adapter (its settings included, but not where its base lies) or of its full weights."""
    digest = hashlib.sha256()
    if (folder / ADAPTER_FILE).is_file():
        settings = read_json(folder / ADAPTER_CONFIG)
        for name in ("base_model_name_or_path", "revision", "inference_mode"):
            settings.pop(name, None)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        files = [folder / ADAPTER_FILE]
    else:
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _files_hash(files, digest)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the tokenizer's files, its chat template included."""
    return _files_hash([folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()], hashlib.sha256())


def base_model_hash(model: torch.nn.Module) -> str:
    """
    SHA-256 of values sampled from every tensor of the model below an adapter, rounded to bf16, so that the base may be
    loaded in another precision. Quantised tensors are passed over.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name or is_packed(parameter) or not parameter.is_floating_point():
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(name.encode() + values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def catalogue_hash(items: Dataset) -> str:
    """SHA-256 of the catalogue's rows, in their order."""
    return sha256_of(arrow_batches(items))


def file_hashes(folder: Path, prompt_config: PromptConfig, items: Dataset) -> dict[str, str]:
    """The hashes that can be taken from a bundle's files: everything but the base model."""
    return {
        "weights": weights_hash(folder),
        "prompts": prompt_config.fingerprint(),
        "tokenizer": tokenizer_hash(folder),
        "catalogue": catalogue_hash(items),
    }


def write_catalogue(folder: Path, items: Dataset, rows: torch.Tensor, hashes: Mapping[str, str]) -> str:
    """Write items and item table into a folder of their own inside `folder`, named after both; returns its name."""
    tensor = rows.detach().to("cpu", torch.float32).contiguous()
    key = hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode())
    key.update(tensor.numpy().data)
    name = CATALOGUE_FOLDER.format(key.hexdigest()[:8])
    if (folder / name).exists():
        return name
    temporary = folder / f".{name}.unfinished-{os.getpid()}"
    temporary.mkdir()
    try:
        schema = items.with_format("arrow")[:0].schema.remove_metadata()
        with pq.ParquetWriter(temporary / ITEMS_FILE, schema) as writer:
            for batch in arrow_batches(items):
                writer.write_table(batch.cast(schema))
        save_file({"rows": tensor}, temporary / TABLE_FILE, metadata=dict(hashes))
        os.rename(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def catalogue_name(name: str) -> str:
    """The name of a catalogue's folder; anything else, such as a path, is a [`UserError`]: old ones are deleted."""
    if not re.fullmatch(CATALOGUE_FOLDER.format("[0-9a-f]{8}"), name):
        raise UserError(f"{META_FILE} says that the catalogue is in {name!r}, which is no catalogue's name.")
    return name


def read_items(file: Path) -> Dataset:
    """The catalogue of a bundle."""
    try:
        return Dataset(pq.read_table(file))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as the bundle's items: {_first_line(error)}") from error


def read_table(file: Path) -> tuple[torch.Tensor, dict[str, str]]:
    """Rows, memory-mapped, and the hashes of what they were made with."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor("rows"), tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as an item table: {_first_line(error)}") from error


def check_hashes(found: Mapping[str, str], recorded: Mapping[str, str], folder: Path) -> None:
    """Raise [`UserError`] that says which parts of the bundle the item table was not made with."""
    wrong = [name for name, value in found.items() if recorded.get(name) != value]
    if wrong:
        parts = " and ".join([", ".join(wrong[:-1]), wrong[-1]] if len(wrong) > 1 else wrong)
        raise UserError(
            f"The item table of the bundle {str(folder)!r} was made with another {parts} than the bundle holds; take "
            "all files from one bundle, or write it anew with recipes/recommend.py --save_bundle."
        )


class _ItemPrompts(Sequence):
    """Item prompts made when they are asked for: a catalogue of a million items loads at once."""

    def __init__(self, prompts: Prompts, items: Dataset):
        self.prompts, self.items = prompts, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row):
        return self.prompts.item_ids(self.items[row])


def table_of(prompts: Prompts, items: Dataset, rows: torch.Tensor, similarity: str) -> ItemTable:
    """An item table of rows that were encoded before, `(N, d)`."""
    return ItemTable.from_rows(items["item_id"][:], _ItemPrompts(prompts, items), rows, similarity)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; [`UserError`] when it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object with keys.")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.unfinished-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _files_hash(files: Iterable[Path], digest: Any) -> str:
    for file in files:
        try:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {_first_line(error)}") from error
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
