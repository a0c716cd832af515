"""Ratings and times of a user's purchases, checked before they become words."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from r2ec_trl.errors import UserError

TOO_LATE = 100_000_000_000  # seconds: the year 5138; milliseconds lie beyond


class PurchaseValues(NamedTuple):
    """
    Numbers beside a history; what is unknown is `None`.

    Attributes:
        ratings (`list[float | None]`): one a purchase.
        times (`list[int | None]`): seconds since 1970, one a purchase.
        now (`int`): the moment that times are told from: the user's `timestamp`, or else the newest purchase's.
    """

    ratings: list[float | None]
    times: list[int | None]
    now: int


def purchase_values(user: Mapping[str, Any], purchases: int, name: str) -> PurchaseValues:
    """
    The numbers of `history_ratings`, `history_timestamps` and `timestamp`, as plain lists of `purchases` values.

    Raises:
        [`UserError`]: for a list of another length, and for a value that is no finite number or no time in seconds.
    """
    columns = {}
    for key in ("history_ratings", "history_timestamps"):
        given: Any = user.get(key)
        given = given.tolist() if hasattr(given, "tolist") else given  # numpy, torch
        if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Sequence)):
            raise UserError(f"{name}: `{key}` is {given!r:.80}; give a list with one number a purchase.")
        if given and len(given) != purchases:
            raise UserError(f"{name} has {purchases} purchases, but {len(given)} `{key}`.")
        columns[key] = [_number(value, key, name) for value in given or [None] * purchases]
    now = _number(user.get("timestamp"), "timestamp", name)
    for key, value in [("timestamp", now), *(("history_timestamps", time) for time in columns["history_timestamps"])]:
        if value is not None and abs(value) >= TOO_LATE:
            raise UserError(f"{name}: `{key}` holds {value:g}, which is no time in seconds since 1970; convert it.")
    times = [None if value is None else int(value) for value in columns["history_timestamps"]]
    newest = max((time for time in times if time is not None), default=0)
    return PurchaseValues(columns["history_ratings"], times, newest if now is None else int(now))


def _number(value: Any, key: str, name: str) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}: `{key}` holds {value!r:.80}; give a number, or null where it is unknown.")
    try:
        if math.isfinite(value):
            return value  # type: ignore[return-value]
    except OverflowError:
        pass
    raise UserError(f"{name}: `{key}` holds {value!r:.80}, which is not finite; give null where it is unknown.")
