"""Recommendations from a bundle."""

from r2ec_trl.moved import imported_when_used

_HOMES = {"Recommendation": "recommender", "Recommender": "recommender"}
__all__ = sorted(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)
