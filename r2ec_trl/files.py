"""The only atomic writer: files and folders are built beside their place, synced, then renamed into it."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from r2ec_trl.errors import UserError

LOCK_FILE = ".lock"
_SCRATCH = re.compile(r"\.(.+)\.(unfinished|replaced)-(\d+)-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}")
_FOREIGN_AGE = 7 * 86_400.0  # seconds after which scratch of another machine counts as left behind
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR), "remove it first"),
}


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    write_with(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write indented JSON, whole or not at all; [`UserError`] for NaN and infinity, which JSON has not."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be written: a figure in it is NaN or infinite ({error}).") from error
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """A nested value with `None` for NaN and infinities, as JSON needs it."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_with(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """
    Let `write(scratch)` make a file beside `path` (a name without suffix), then give it its name. Folders are created;
    [`UserError`] says in one sentence why it cannot be written.
    """
    path = Path(path)
    scratch = _scratch(path, "unfinished")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            write(scratch)
            _sync(scratch)
            os.replace(scratch, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink()


@contextmanager
def build_folder(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """
    Yields an empty folder beside `path` and swaps it in whole; when the block fails, nothing has changed. With
    `replace` an old one is renamed away, and deleted when the new one has its name; without, it is a [`UserError`].
    """
    path = Path(os.path.realpath(path))
    scratch, old = _scratch(path, "unfinished"), _scratch(path, "replaced")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            scratch.mkdir()
            yield scratch
            readers = scratch.stat().st_mode & 0o666  # the umask's: safetensors writes for the owner alone
            for folder, _, names in os.walk(scratch):
                for name in names:
                    os.chmod(Path(folder, name), readers)
                for name in ("", *names):
                    _sync(Path(folder, name))
            if replace and path.exists():
                os.rename(path, old)
            elif os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(scratch, path)
            _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for rest in (scratch, old):
            shutil.rmtree(rest, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder: renamed away first, so that what is half deleted never stands under its name."""
    old = _scratch(path, "unfinished")
    with explained(path), suppress(FileNotFoundError):
        os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """
    Remove what processes that are gone left half written in a folder. A folder that one of them had renamed away and
    not replaced yet gets its name back.
    """
    folder = Path(folder)
    for name in os.listdir(folder) if folder.is_dir() else ():
        found, path = _SCRATCH.fullmatch(name), folder / name
        with suppress(OSError):  # somebody else may be removing it too
            if found is None or _is_used(path, *found.group(3, 4, 5)):
                continue
            if found[2] == "replaced" and not os.path.lexists(folder / found[1]):
                os.rename(path, folder / found[1])
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def lock_folder(folder: str | os.PathLike, timeout: float = 60.0) -> Iterator[None]:
    """
    Keep other processes and threads out while a folder is changed, or replaced by [`build_folder`]. The lock ends with
    its process, however that ends; [`UserError`] names the owner when it is not free after `timeout` seconds.
    """
    file, start = Path(os.path.realpath(folder)) / LOCK_FILE, time.monotonic()
    while True:
        with explained(folder):
            try:
                handle = open(file, "a+", encoding="utf-8")
            except FileNotFoundError:
                if time.monotonic() > start + min(timeout, 1):  # else it is being replaced
                    raise
                continue
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_open(file, handle):  # else its last owner has deleted it, or the folder was replaced
                    break
        handle.seek(0)
        owner = handle.read() or "another process"
        handle.close()
        if time.monotonic() > start + timeout:
            raise UserError(
                f"{str(folder)!r} is being changed by {owner} and was not free within {timeout:g} seconds; wait for "
                "it to end, or stop it."
            )
        time.sleep(0.01)
    try:
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
    finally:
        if _is_open(file, handle):
            file.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold the handle for longer
        handle.close()


@contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turn a failure to write `path` (full disk, read-only, no permission) into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        code = getattr(error, "errno", None) or (int(number[1]) if number else 0)
        reason = os.strerror(code) if code else " ".join(str(error).split()) or type(error).__name__
        if str(path).startswith(f"{getattr(error, 'filename', None)}{os.sep}"):  # a file where a folder should be
            reason += f": {error.filename}"  # type: ignore[union-attr]
        cure = _CURES.get(code, "see that you may write there")
        raise UserError(f"{str(path)!r} cannot be written ({reason}): {cure}, or choose another place.") from error


def _scratch(path: Path, kind: str) -> Path:
    """A name beside `path` that nothing else has: it tells the owner, so that others know when it is left behind."""
    owner = f"{os.getpid()}-{_started(os.getpid())}-{_host()}-{os.urandom(4).hex()}"
    return path.with_name(f".{path.name}.{kind}-{owner}")


def _is_used(path: Path, pid: str, started: str, host: str) -> bool:
    if host != _host():
        return time.time() - path.stat().st_mtime < _FOREIGN_AGE
    return _started(int(pid)) in (int(started), 0)


def _started(pid: int) -> int:
    """When a process started, in the kernel's ticks; -1 where there is none, 0 where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if state == "Z" else int(fields[18])
    except OSError:
        with suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, OverflowError):
                return -1
        return 0


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_open(file: Path, handle: Any) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    return False


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(number)
