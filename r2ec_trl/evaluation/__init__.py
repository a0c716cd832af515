"""Greedy reasoning and the whole catalogue: users, baselines, reports."""

from r2ec_trl.moved import imported_when_used

_HOMES = {
    "REASONING_MODES": "users",
    "alter_reasoning": "users",
    "evaluate_users": "users",
    "gather_rows": "users",
    "own_rows": "users",
    "summarise_users": "users",
}
__all__ = sorted(_HOMES)
__getattr__ = imported_when_used(__name__, _HOMES)
