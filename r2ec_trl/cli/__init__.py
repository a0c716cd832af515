"""What recipes share: parsing, choices, live display, learning curve, tables, plan, how a run ends."""

from importlib import import_module
from typing import Any

_HOMES = {"RecipeParser": "parsing", "did_you_mean": "parsing", "parse": "parsing", "run": "parsing"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
