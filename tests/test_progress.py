"""Reports reach the newest watcher, and nobody when there is none."""

from r2ec_trl import progress


def test_the_members_of_batches_are_counted():
    seen = []
    progress.watch(note := lambda *report: seen.append(report))
    try:
        assert list(progress.track([[4, 2], [0], [3, 1]], "encoding")) == [[4, 2], [0], [3, 1]]
    finally:
        progress.unwatch(note)
    assert seen == [("encoding", done, 5) for done in (0, 2, 3, 5)]


def test_the_newest_watcher_alone_hears_until_it_goes():
    old, new = [], []
    first, second = (lambda *report: old.append(report)), (lambda *report: new.append(report))
    progress.watch(first)
    progress.watch(second)
    progress.report("a", 1, 2)
    progress.unwatch(second)
    progress.report("b", 1, 2)
    progress.unwatch(first)
    progress.report("c", 1, 2)
    assert (old, new) == ([("b", 1, 2)], [("a", 1, 2)])
