"""`bundle.json`: one dataclass, one reader that checks every value, one writer that seals them."""

import dataclasses
import hashlib
import json
import logging
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2ec_trl.errors import UserError, first_line
from r2ec_trl.files import write_json
from r2ec_trl.policy.prompts import LATER_FIELDS, PromptConfig
from r2ec_trl.policy.settings import SIMILARITIES

logger = logging.getLogger(__name__)

META_FILE = "bundle.json"
FORMAT, OLDEST_FORMAT = 2, 1
CATALOGUE_FOLDER = "catalogue-{}"  # with eight hex digits, new at every change
SEAL = "settings"  # the hash over bundle.json itself
OF_CATALOGUE = ("catalogue", "item file", "item table", SEAL)  # hashes that a change of the catalogue changes
OLD_NAMES = {"max_new_tokens": "max_completion_length", "token_budget": "forward_token_budget"}
_MOVABLE = ("base_model", "base_revision")  # where a base lies may change; what it holds has a hash of its own
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_QUANTIZATION = (
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


@dataclass(frozen=True)
class Protocol:
    """
    How a bundle answers.

    Args:
        reasoning (`str`):
            `"full"` or `"none"`.
        max_completion_length (`int`):
            Longest reasoning in tokens.
        item_temperature (`float`):
            τ of log-probabilities.
        forward_token_budget (`int`):
            Most tokens of one forward.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            `"bf16"` or `"fp16"`: forwards run under that autocast.
    """

    reasoning: str
    max_completion_length: int
    item_temperature: float
    forward_token_budget: int
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name, wrong in (
            ("reasoning", self.reasoning not in ("full", "none")),
            ("max_completion_length", self.max_completion_length < 1),
            ("item_temperature", not 0 < self.item_temperature < math.inf),
            ("forward_token_budget", self.forward_token_budget < 1),
            ("mixed_precision", self.mixed_precision not in ("no", "bf16", "fp16", "fp8")),
        ):
            if wrong:
                raise UserError(f"The bundle's protocol: `{name}` is {getattr(self, name)!r}, which is out of range.")

    @classmethod
    def read(cls, values: Any, where: str = "The bundle's protocol") -> "Protocol":
        """From a mapping; names of 0.1.0 are read as well, with one warning."""
        if isinstance(values, Protocol):
            return values
        if isinstance(values, Mapping) and (old := sorted(values.keys() & OLD_NAMES.keys())):
            logger.warning("%s: %s", where, ", ".join(f"`{name}` is now `{OLD_NAMES[name]}`" for name in old))
            values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
        return _read(cls, values, where)


@dataclass(frozen=True)
class BundleMeta:
    """What `bundle.json` holds: how to load the model, how it answers, what it reached, and hashes of it all."""

    adapter: bool
    base_model: str
    dtype: str
    quantization: dict[str, Any]
    prompts: PromptConfig
    similarity: str
    protocol: Protocol
    num_items: int
    base_revision: str | None = None  # of a model from the hub
    attn_implementation: str | None = None
    adapter_dtype: str | None = None
    dataset_card: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    catalogue: str = ""
    hashes: dict[str, str] = field(default_factory=dict)

    def seal(self, without: Collection[str] = ()) -> str:
        """SHA-256 over everything but where the base lies, and prompt fields that came after it."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))  # as they are read back
        values["prompts"] = {name: value for name, value in values["prompts"].items() if name not in without}
        values["hashes"] = {name: value for name, value in self.hashes.items() if name != SEAL}
        kept = {name: value for name, value in values.items() if name not in _MOVABLE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def is_sealed(self) -> bool:
        """Whether it is what was sealed, by this version or by one without the newest prompt fields."""
        defaults = {one.name: one.default for one in dataclasses.fields(PromptConfig)}
        unsaid = [name for name in LATER_FIELDS if getattr(self.prompts, name) == defaults[name]]
        return self.hashes[SEAL] in [self.seal(unsaid[first:]) for first in range(len(unsaid), -1, -1)]

    def sealed(self) -> "BundleMeta":
        """Itself with the seal among its hashes."""
        return dataclasses.replace(self, hashes={**self.hashes, SEAL: self.seal()})

    def without_catalogue(self) -> "BundleMeta":
        """What of it no change of the catalogue or of the figures changes."""
        hashes = {name: value for name, value in self.hashes.items() if name not in OF_CATALOGUE}
        return dataclasses.replace(self, catalogue="", num_items=0, metrics={}, hashes=hashes)


def write_meta(folder: Path, meta: BundleMeta) -> None:
    """Write `bundle.json`: the moment at which a change holds."""
    write_json(folder / META_FILE, {"format": FORMAT, **dataclasses.asdict(meta)})


def read_meta(folder: Path) -> BundleMeta:
    """
    `bundle.json` of this or an older format.

    Raises:
        [`UserError`]: for a file that cannot be read, lacks a key, holds a value of another type or out of range, or
        has no seal ([`~r2ec_trl.bundle.format.check_parts`] compares it).
    """
    file = folder / META_FILE
    values = read_json(file)
    number = values.pop("format", None)
    if isinstance(number, bool) or not isinstance(number, int) or not OLDEST_FORMAT <= number <= FORMAT:
        raise UserError(f"The bundle {str(folder)!r} has format {number!r:.80}; this version reads {FORMAT}.")
    values["prompts"] = _read(PromptConfig, values.get("prompts"), f"{file}, `prompts`")
    values["protocol"] = Protocol.read(values.get("protocol"), f"{file}, `protocol`")
    meta = _read(BundleMeta, values, str(file))
    for name, known in (("similarity", SIMILARITIES), ("dtype", _DTYPES), ("adapter_dtype", (None, *_DTYPES))):
        if getattr(meta, name) not in known:
            raise UserError(f"{file}: `{name}` is {getattr(meta, name)!r}; it must be one of {known}.")
    if unknown := sorted(meta.quantization.keys() - set(_QUANTIZATION)):
        raise UserError(f"{file}: `quantization` has the unknown key {unknown[0]!r}.")
    for name, value in meta.quantization.items():
        if not isinstance(value, str if name in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage") else bool):
            raise UserError(f"{file}: `quantization` has {name} {value!r:.80}.")
    if not re.fullmatch(CATALOGUE_FOLDER.format("[0-9a-f]{8}"), meta.catalogue):
        raise UserError(f"{file} says that the catalogue is in {meta.catalogue!r}, which is no catalogue's name.")
    if number > 1 and SEAL not in meta.hashes:
        raise UserError(f"{file} has no seal; take the file that was written with the bundle.")
    return meta


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; [`UserError`] when it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object with keys.")
    return value


def _read(kind: Any, values: Any, where: str) -> Any:
    """A dataclass of values whose types are those of its fields; [`UserError`] names the key otherwise."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} lacks or misspells a key: it is {values!r:.80}, not an object with keys.")
    wanted = {one.name: one for one in dataclasses.fields(kind)}
    needed = [name for name, one in wanted.items() if one.default is one.default_factory is dataclasses.MISSING]
    if absent := [name for name in needed if name not in values]:
        raise UserError(f"{where} lacks or misspells a key: there is no `{absent[0]}`.")
    if unknown := [name for name in values if name not in wanted]:
        raise UserError(f"{where} lacks or misspells a key: {unknown[0]!r:.80} is none.")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f"{where}: `{name}` is {value!r:.80}, but should be {_words(hints[name])}.")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in args)
    if origin is tuple:  # lists in JSON
        return isinstance(value, (list, tuple)) and all(_fits(one, args[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, args[1]) for one in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    origins = {dict: "an object", tuple: "a list of texts"}
    return " or ".join(names.get(one) or origins.get(typing.get_origin(one) or one, str(one)) for one in parts)
