"""Raw sources: one file a kind, and the readers they share."""

from importlib import import_module

from r2ec_trl.data.sources.source import Kind
from r2ec_trl.errors import UserError

KINDS = ("amazon", "movielens", "recbole", "table", "sequences")  # a new source: its file with a `KIND`, its name here


def kind_of(name: str) -> Kind:
    """The [`Kind`] of a source, from the file of its name."""
    if name not in KINDS:
        raise UserError(f"--source {name!r} is unknown: choose one of {', '.join(KINDS)}.")
    return import_module(f"{__name__}.{name}").KIND
