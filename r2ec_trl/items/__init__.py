"""The catalogue as the model sees it: the item table and the scoring of answer states against it.

Names resolve on first use, so that the scoring functions do not pull in a tokenizer or a trainer.
"""

from r2ec_trl.moved import imported_when_used

_HOMES = {
    "CatalogueScores": "scoring",
    "ItemTable": "table",
    "exclusion_matrix": "scoring",
    "normalise": "scoring",
    "target_rank_and_logprob": "scoring",
    "top_k": "scoring",
}
__all__ = sorted(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
