"""Users as they are asked about: one reader of JSON lines, one check of a user's fields."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from r2ec_trl.data.sources.jsonl import refuse_no_text
from r2ec_trl.errors import UserError
from r2ec_trl.policy.purchases import purchase_values

History: TypeAlias = "Sequence[str] | Mapping[str, Any]"

KEYS = ("user_id", "history", "history_titles", "history_ratings", "history_timestamps", "timestamp")
MAX_LINE = 2**24  # characters of one user


def check_user(history: History, name: str) -> dict[str, Any]:
    """
    One user's fields, checked: a list of item ids becomes `{"history": ids}`, a `user_id` that is a number a text.

    Args:
        history (`Sequence[str]` or `Mapping`):
            See [`~r2ec_trl.serving.recommender.Recommender.recommend`]. A dataset row's `target` is passed over.
        name (`str`):
            What a sentence calls the user, such as `User 3` or `users.jsonl, line 4`.

    Raises:
        [`UserError`]: for a key, type or value that does not belong there.
    """
    if isinstance(history, (str, bytes)) or not isinstance(history, (Mapping, Sequence)):
        raise UserError(f"{name} is neither a list of item ids nor an object with `history`, but {_short(history)}.")
    user: dict[str, Any] = dict(history) if isinstance(history, Mapping) else {"history": list(history)}
    user.pop("target", None)
    if unknown := [key for key in user if key not in KEYS]:
        raise UserError(f"{name} has the key {_short(unknown[0])}; give {', '.join(KEYS)}.")
    user = {key: value for key, value in user.items() if value is not None}
    if isinstance(user.get("user_id"), int) and not isinstance(user["user_id"], bool):
        user["user_id"] = str(user["user_id"])
    if "user_id" in user and not is_text(user["user_id"]):
        raise UserError(f"{name}: `user_id` is {_short(user['user_id'])}; give a text.")
    if ("history" in user) == ("history_titles" in user):
        raise UserError(f"{name}: give either `history` (item ids) or `history_titles`.")
    key = "history" if "history" in user else "history_titles"
    if isinstance(user[key], (str, bytes, Mapping)) or not isinstance(user[key], Iterable):
        raise UserError(f"{name}: `{key}` must be a list of texts, not {_short(user[key])}.")
    user[key] = list(user[key])
    for purchase in user[key]:
        if not is_text(purchase) or not purchase.strip():
            raise UserError(f"{name}: `{key}` must be a list of texts, but holds {_short(purchase)}.")
    purchase_values(user, len(user[key]), name)
    return user


def read_users(source: str | os.PathLike | IO[bytes] | IO[str]) -> list[dict[str, Any]]:
    """
    Users of a file or stream of JSON lines, each checked by [`check_user`]; blank lines are passed over.

    Raises:
        [`UserError`]: that names file and line, for what cannot be read, is not UTF-8, no JSON or no user.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            with open(path, "rb") as lines:
                return _users(lines, str(path))
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read ({error.strerror}); give a file of JSON lines.") from error
    return _users(getattr(source, "buffer", source), "standard input")


def _users(lines: IO[bytes] | IO[str], name: str) -> list[dict[str, Any]]:
    users = []
    for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), lines.read(0)), start=1):
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise UserError(f"{where} has more than {MAX_LINE:,} characters; give one user a line.")
        try:
            if number == 1 and isinstance(line, bytes):
                _refuse_no_lines(line, name)
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
            if not text.strip():
                continue
            value = json.loads(text)
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text; convert the file (iconv -t UTF-8).") from error
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(f"{where} is not JSON: {reason}.") from error
        users.append(check_user(value, where))
    return users


def _refuse_no_lines(start: bytes, name: str) -> None:
    if start.startswith(b"PAR1"):
        raise UserError(f"{name} is a Parquet file: recommend.py reads it with --output FOLDER, else give JSON lines.")
    refuse_no_text(start, name)


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written; JSON may hold halves of a surrogate pair."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
