"""Greedy reasoning and the whole catalogue: users, baselines, reports."""

from importlib import import_module
from typing import Any

_HOMES = {
    "REASONING_MODES": "users",
    "alter_reasoning": "users",
    "cold_targets": "users",
    "evaluate_users": "users",
    "gather_rows": "users",
    "own_rows": "users",
    "summarise_users": "users",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
