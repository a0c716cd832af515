"""From raw sources to a dataset folder (`schema`), by way of `splits` and `audit`; names are loaded on first use."""

from importlib import import_module
from typing import Any

_HOMES = {
    "SPLITS": "schema",
    "ITEMS": "schema",
    "load_dataset_folder": "schema",
    "load_dataset_card": "schema",
    "save_dataset_folder": "schema",
    "validate_dataset": "schema",
    "import_sequences": "sequences",
    "cut_dataset": "cut",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
