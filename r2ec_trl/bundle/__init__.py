"""A trained recommender as one folder."""

from r2ec_trl.moved import imported_when_used

_HOMES = {"Bundle": "bundle", "save_bundle": "bundle"}
__all__ = sorted(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)
