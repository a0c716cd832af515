"""The parts of a bundle on disk, and the hashes that tell whether they are those that were written together."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from datasets import Dataset
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r2ec_trl.bundle.meta import CATALOGUE_FOLDER, META_FILE, SEAL, BundleMeta, read_json, read_meta
from r2ec_trl.data.fingerprint import sha256_of
from r2ec_trl.data.schema import arrow_batches
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.files import LOCK_FILE, build_folder, remove_leftovers, write_json
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy import loading
from r2ec_trl.policy.adapters import is_packed
from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.policy.prompts import Prompts

ITEMS_FILE, TABLE_FILE = "items.parquet", "item_table.safetensors"
CARD_FILE = "README.md"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ITEM_FILE, ITEM_TABLE = "item file", "item table"  # xxHash of the two files' bytes, before they are parsed
_CATALOGUE_FILES = ((ITEM_FILE, ITEMS_FILE, "the bundle's items"), (ITEM_TABLE, TABLE_FILE, "an item table"))
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
_MORE_TOKENIZER_FILES = ("vocab.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
_PARTS = [CATALOGUE_FOLDER.format("*/*"), "*.safetensors", "*.index.json", "*.py", "config.json", ADAPTER_CONFIG]
_PARTS += ["generation_config.json", *_TOKENIZER_FILES, *_MORE_TOKENIZER_FILES]
_TRIES = 5  # to read a bundle that is being replaced
_SAMPLED_VALUES = 64  # of each tensor of a base model: its hash should cost nothing


def bundle_folder(name_or_folder: str | os.PathLike) -> tuple[Path, bool]:
    """Local folder of a bundle, downloaded if it is a hub id, and whether it was local."""
    folder, is_local = Path(name_or_folder), True
    for _ in range(20):  # while another process puts a new one in its place
        if folder.is_dir() or not any(folder.parent.glob(f".{folder.name}.replaced-*")):
            break
        remove_leftovers(folder.parent)
        time.sleep(0.05)
    if not folder.is_dir():
        try:
            folder, is_local = Path(snapshot_download(str(name_or_folder))), False
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"The bundle {str(name_or_folder)!r} is neither a folder nor a hub id that can be reached: "
                f"{first_line(error)}"
            ) from error
    if not (folder / META_FILE).is_file():
        inside = folder / "bundle"
        hint = str(inside) if (inside / META_FILE).is_file() else "the folder `bundle` that recipes/recpo.py wrote"
        raise UserError(f"{str(name_or_folder)!r} has no {META_FILE}; give {hint}.")
    return folder, is_local


def check_output(folder: str | os.PathLike) -> None:
    """
    Raise [`UserError`] where a bundle could not be saved: something else lies there, or nothing can be written. Long
    work should find that out before it starts.
    """
    folder = Path(os.path.realpath(folder))
    if (
        folder.exists()
        and not (folder / META_FILE).is_file()
        and (not folder.is_dir() or any(one.name != LOCK_FILE for one in folder.iterdir()))
    ):
        raise UserError(f"{str(folder)!r} exists and is no bundle; choose another folder for it.")
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{str(folder)!r} cannot be written, because {str(parent)!r} cannot; choose another folder.")


class Parts(NamedTuple):
    """What [`read_parts`] reads of a bundle; `rows` are memory-mapped, `made_with` are the hashes they came with."""

    folder: Path
    is_local: bool
    meta: BundleMeta
    items: Dataset
    rows: torch.Tensor
    made_with: dict[str, str]


def read_parts(name_or_folder: str | os.PathLike) -> Parts:
    """A bundle but for its model, checked before it is parsed; read again if another process changes it meanwhile."""
    while True:
        folder, is_local = bundle_folder(name_or_folder)
        meta = read_meta(folder)
        try:
            check_parts(folder, meta)
            items = read_items(folder / meta.catalogue / ITEMS_FILE)
            rows, made_with = read_table(folder / meta.catalogue / TABLE_FILE, is_checked=SEAL in meta.hashes)
        except UserError:
            if folder.is_dir() and read_meta(folder) == meta:
                raise
            continue
        if SEAL not in meta.hashes:  # format 1
            found = part_hashes(folder, meta) | {"catalogue": sha256_of(arrow_batches(items))}
            check_hashes(found, made_with, folder)
        return Parts(folder, is_local, meta, items, rows, made_with)


def read_bundle(
    name_or_folder: str | os.PathLike, model_name_or_path: str | None = None, trust_remote_code: bool = False
) -> tuple[Parts, PreTrainedModel, PreTrainedTokenizerBase]:
    """Parts, model and tokenizer of one bundle; read again if another process replaces it meanwhile."""
    for _ in range(_TRIES):
        parts = read_parts(name_or_folder)
        try:
            model, tokenizer = _read_model(parts.folder, parts.meta, model_name_or_path, trust_remote_code)
        except UserError:
            if _is_still(parts.folder, parts.meta):
                raise
            continue
        if _is_still(parts.folder, parts.meta):
            return parts, model, tokenizer
    raise UserError(f"The bundle {str(name_or_folder)!r} was replaced {_TRIES} times while it was read; try later.")


def _is_still(folder: Path, meta: BundleMeta) -> bool:
    """Whether a folder holds the bundle that was read; its catalogue, read already, may have changed."""
    try:
        return read_meta(folder).without_catalogue() == meta.without_catalogue()
    except UserError:
        return False  # it is being replaced; if it is gone, the next reading says so


def _read_model(folder: Path, meta: BundleMeta, model_name_or_path: str | None, trust_remote_code: bool) -> Any:
    if not meta.adapter and model_name_or_path is not None:
        raise UserError(f"The bundle {str(folder)!r} holds full weights; leave `model_name_or_path` out.")
    args = PolicyArguments(
        model_name_or_path=(model_name_or_path or meta.base_model) if meta.adapter else str(folder),
        adapter=str(folder) if meta.adapter else None,
        dtype=meta.dtype,
        model_revision=(model_name_or_path is None and meta.base_revision) or "main",
        attn_implementation=loading.available_attention(meta.attn_implementation),
        **meta.quantization,
    )
    return load_policy(args, trust_remote_code=trust_remote_code, tokenizer_path=str(folder))


# -------------------------------------------------------------------------- hashes
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


def part_hashes(folder: Path, meta: BundleMeta, catalogue: Path | None = None) -> dict[str, str]:
    """The hashes that can be taken from a bundle's bytes before any of its parts is parsed, read as one stream."""
    is_new = SEAL in meta.hashes or not meta.hashes
    tokenizer = [folder / name for name in _TOKENIZER_FILES]
    tokenizer += sorted({path for name in _MORE_TOKENIZER_FILES for path in folder.glob(name)}.difference(tokenizer))
    digest = hashlib.sha256()
    if (folder / ADAPTER_FILE).is_file():
        settings = read_json(folder / ADAPTER_CONFIG)  # but not where its base lies
        for name in ("base_model_name_or_path", "revision", "inference_mode"):
            settings.pop(name, None)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        weights = [folder / ADAPTER_FILE]
    else:
        code = [*folder.glob("*.py"), *folder.glob("*.index.json"), *folder.glob("generation_config.json")]
        weights = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(code if is_new else [])]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        found = {
            "weights": pool.submit(_files_hash, weights, digest),
            "tokenizer": pool.submit(_files_hash, [file for file in tokenizer if file.is_file()], hashlib.sha256()),
        }
        if catalogue is not None:
            for name, file, what in _CATALOGUE_FILES:
                kind: Any = hashlib.sha256 if len(meta.hashes.get(name, "")) == 64 else xxhash.xxh3_128
                found[name] = pool.submit(_files_hash, [catalogue / file], kind(), what)
        hashes = {name: future.result() for name, future in found.items()}
    return {"prompts": meta.prompts.fingerprint(), **hashes}


def check_hashes(found: Mapping[str, str], recorded: Mapping[str, str], folder: Path) -> None:
    """Raise [`UserError`] that says which parts of the bundle the item table was not made with."""
    wrong = [name for name, value in found.items() if recorded.get(name) != value]
    wrong = [name for name in wrong if name != "rendered prompts" or "prompts" not in wrong]
    if wrong:
        wrong = ["catalogue" if name == ITEM_FILE else name for name in wrong]
        parts = " and ".join([", ".join(wrong[:-1]), wrong[-1]] if len(wrong) > 1 else wrong)
        raise UserError(
            f"The item table of the bundle {str(folder)!r} was made with another {parts} than the bundle holds; take "
            "all files from one bundle, or write it anew with recipes/recommend.py --save_bundle."
        )


def check_parts(folder: Path, meta: BundleMeta) -> None:
    """Raise [`UserError`] where a bundle's bytes are not those that were written together; nothing is parsed first."""
    catalogue, recorded = folder / meta.catalogue, meta.hashes
    if SEAL not in recorded:  # of format 1, whose hashes lie in the item table
        return
    found = part_hashes(folder, meta, catalogue)
    wrong = {name: value for name, value in found.items() if recorded.get(name) != value}
    if wrong.keys() == {ITEM_TABLE}:  # another bundle's says what it was made with
        try:
            made_with = read_table(catalogue / TABLE_FILE)[1]
        except UserError:
            made_with = {}
        check_hashes({name: recorded[name] for name in made_with.keys() & recorded.keys()}, made_with, folder)
        raise UserError(
            f"{catalogue / TABLE_FILE} is not what was written there: its hash differs; take a whole copy."
        )
    check_hashes(wrong, recorded, folder)
    if not meta.is_sealed():
        raise UserError(
            f"{folder / META_FILE} is not what was written there: its hash differs; only base_model and base_revision "
            "may be changed by hand."
        )


# --------------------------------------------------------------- writing and reading parts
def write_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, meta: BundleMeta) -> None:
    """Adapter or full weights, and the tokenizer."""
    if meta.adapter:
        model.save_pretrained(folder, selected_adapters=["default"])
        config = read_json(folder / ADAPTER_CONFIG)
        write_json(folder / ADAPTER_CONFIG, {**config, "base_model_name_or_path": meta.base_model})
        if not (folder / ADAPTER_FILE).is_file():
            raise UserError(f"PEFT wrote no {ADAPTER_FILE}; a bundle holds one adapter named 'default'.")
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def upload(folder: Path, repo_id: str, private: bool | None, token: str | None) -> str:
    """Upload a bundle to the hub; parts of another that lies there are deleted. Returns the commit's address."""
    api = HfApi(token=token)
    commit = api.upload_folder(
        repo_id=api.create_repo(repo_id, private=private, exist_ok=True).repo_id,
        folder_path=folder,
        commit_message="Upload recommender",
        ignore_patterns=[".*"],
        delete_patterns=_PARTS,  # but what is uploaded stays
    )
    return str(commit)


def write_catalogue(folder: Path, items: Dataset, rows: torch.Tensor, made_with: Mapping[str, str]) -> dict[str, str]:
    """
    Write items and item table into a new folder inside `folder`.

    Returns:
        `dict`: what [`BundleMeta.hashes`] holds of them, and the folder's name under `""`.
    """
    tensor = rows.detach().to("cpu", torch.float32).contiguous()
    if not tensor.sum(0).isfinite().all():
        raise UserError("The item table holds NaN or infinite rows; the weights that encoded it are damaged.")
    hashes = {**made_with, "catalogue": sha256_of(arrow_batches(items))}
    name = CATALOGUE_FOLDER.format(os.urandom(4).hex())
    with build_folder(folder / name) as scratch:
        schema = items.with_format("arrow")[:0].schema.remove_metadata()
        with pq.ParquetWriter(scratch / ITEMS_FILE, schema) as writer:
            for batch in arrow_batches(items):
                writer.write_table(batch.cast(schema))
        save_file({"rows": tensor}, scratch / TABLE_FILE, metadata=dict(hashes))
        for key, file, what in _CATALOGUE_FILES:
            hashes[key] = _files_hash([scratch / file], xxhash.xxh3_128(), what)
    return {**hashes, "": name}


def read_items(file: Path) -> Dataset:
    """The catalogue of a bundle."""
    try:
        table = pq.read_table(file)
        for name in ("item_id", "title"):
            column = table[name]
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
                raise KeyError(f"column {name!r} must hold texts")
        return Dataset(table)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as the bundle's items: {first_line(error)}") from error


def read_table(file: Path, is_checked: bool = False) -> tuple[torch.Tensor, dict[str, str]]:
    """Rows, memory-mapped, and the hashes of what they were made with; `is_checked`: its hash is what was written."""
    try:
        with safe_open(file, framework="pt") as tensors:
            rows, made_with = tensors.get_tensor("rows"), tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as an item table: {first_line(error)}") from error
    if rows.dtype != torch.float32 or rows.ndim != 2 or not (is_checked or rows.sum(0).isfinite().all()):
        raise UserError(f"{file} holds {rows.dtype} of shape {tuple(rows.shape)}; rows are finite float32, (N, d).")
    return rows, made_with


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


def _files_hash(files: Iterable[Path], digest: Any, what: str = "a part of the bundle") -> str:
    block = memoryview(bytearray(2**18))
    for file in files:
        try:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb", buffering=0) as stream:
                while length := stream.readinto(block):
                    digest.update(block[:length])
        except OSError as error:
            raise UserError(f"{file} cannot be read as {what}: {first_line(error)}") from error
    return digest.hexdigest()
