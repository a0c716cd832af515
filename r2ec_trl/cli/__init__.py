"""What recipes share: parsing, choices, live display, learning curve, tables, plan, how a run ends."""

from r2ec_trl.moved import imported_when_used

_HOMES = {"RecipeParser": "parsing", "did_you_mean": "parsing", "parse": "parsing", "run": "parsing"}
__all__ = sorted(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)
