"""The catalogue as the model sees it: the item table and the scoring of answer states against it.

Names resolve on first use, so that the scoring functions do not pull in a tokenizer or a trainer.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CatalogueScores": "scoring",
    "ItemTable": "table",
    "exclusion_matrix": "scoring",
    "normalise": "scoring",
    "target_rank_and_logprob": "scoring",
    "top_k": "scoring",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
