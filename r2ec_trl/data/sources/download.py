"""Fetch a file by URL: progress, resume after a break, size checked, nothing half fetched under the final name."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from r2ec_trl.errors import UserError

Progress = Callable[[str, int, int], None]  # file name, bytes so far, bytes in all (0 if the server does not say)
_CHUNK = 1 << 20


def download(
    url: str, path: str | os.PathLike[str], *, progress: Progress | None = None, attempts: int = 5, timeout: float = 60
) -> Path:
    """
    Download `url` to `path`; a file that is there already is taken as it is.

    What arrived stays in `path` + `.part`, from which the next attempt, or the next run, goes on.

    Args:
        url (`str`):
            Address of the file.
        path (`str` or `os.PathLike`):
            Where to put it.
        progress (`Callable`, *optional*):
            Called with file name, bytes so far and bytes in all.
        attempts (`int`, *optional*, defaults to 5):
            Attempts in a row that bring nothing new before giving up.
        timeout (`float`, *optional*, defaults to 60):
            Seconds without an answer that end an attempt.
    """
    path = Path(path)
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    left, fault = attempts, ""
    while left:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch(url, part, path.name, progress, timeout):
                os.replace(part, path)
                return path
            fault = "the connection broke"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(
                    f"{url} cannot be fetched ({error.code} {error.reason}): check category and URL."
                ) from error
            fault = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            fault = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        left = attempts if after > before else left - 1
    raise UserError(f"{url} cannot be fetched ({fault}): run again, it goes on where it stopped.")


def _fetch(url: str, part: Path, name: str, progress: Progress | None, timeout: float) -> bool:
    """One attempt; True if the file is complete."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        # "Range not satisfiable": nothing is missing, or the file is another one now.
        total = _total(error.headers.get("Content-Range"))
        if error.code != 416 or not done:
            raise
        if total == done:
            return True
        part.unlink()
        return False
    with response:
        if response.status == 206:
            total = _total(response.headers.get("Content-Range"))
        else:
            done, total = 0, int(response.headers.get("Content-Length") or 0)
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if done else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(name, done, total)
    return done == total or not total


def _total(content_range: str | None) -> int:
    found = re.search(r"/(\d+)$", content_range or "")
    return int(found.group(1)) if found else 0
