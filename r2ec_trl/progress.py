"""How far long work has come: the library reports, `cli` shows it. Nobody watching costs nothing."""

from collections.abc import Callable, Iterator, Sequence

Watcher = Callable[[str, int, int], None]
_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Call `watcher(what, done, total)` with every report from now on; the newest watcher alone gets them."""
    _watchers.append(watcher)


def unwatch(watcher: Watcher) -> None:
    """Stop it; the one before gets the reports again."""
    if watcher in _watchers:
        _watchers.remove(watcher)


def report(what: str, done: int, total: int) -> None:
    """Say that `done` of `total` are done; the work ends with `done == total`."""
    if _watchers:
        _watchers[-1](what, done, total)


def track(batches: Sequence[Sequence[int]], what: str) -> Iterator[Sequence[int]]:
    """Yield the batches and report how many of their members are done: `for batch in track(batches, "encoding"):`."""
    done, total = 0, sum(map(len, batches))
    for batch in batches:
        report(what, done, total)
        yield batch
        done += len(batch)
    report(what, total, total)
