"""MovieLens: 100k (`u.data`), 1M and 10M (`ratings.dat`), and the newer CSV files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from r2ec_trl.data.sources.delimited import Dialect, read_table
from r2ec_trl.data.sources.source import Kind, Source, check_interactions, check_same_ids, checked_items
from r2ec_trl.errors import UserError

_NAMES = ("user_id", "item_id", "rating", "timestamp")


def import_movielens(folder: str | os.PathLike[str], *, skip_bad_rows: bool = False) -> Source:
    """
    Read an unpacked MovieLens folder; which release it is, its files say.

    Items get `title` (as released, with the year), `genres` and, where there is one, `year`.

    Args:
        folder (`str` or `os.PathLike`):
            Folder with `u.data` and `u.item`, `ratings.dat` and `movies.dat`, or `ratings.csv` and `movies.csv`.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out and count them.
    """
    folder = Path(folder)
    dropped: Counter[str] = Counter()
    skipped = dropped if skip_bad_rows else None
    for ratings, items, read in (
        ("u.data", "u.item", _read_100k),
        ("ratings.dat", "movies.dat", _read_dat),
        ("ratings.csv", "movies.csv", _read_csv),
    ):
        if (folder / ratings).is_file():
            if not (folder / items).is_file():
                raise UserError(f"'{folder}' has {ratings} but no {items}: unpack the whole archive.")
            interactions, movies = read(folder / ratings, folder / items, skipped)
            year = pl.col("title").str.extract(r"\(([0-9]{4})\)\s*$", 1)
            movies = movies.with_columns(year=year)
            check_same_ids(interactions, movies, folder / ratings, folder / items)
            name = f"movielens: {folder.name}"
            return Source(name, interactions, movies, 1, dropped)
    raise UserError(f"'{folder}' has no u.data, ratings.dat or ratings.csv: pass an unpacked MovieLens folder.")


def _read_100k(ratings: Path, items: Path, skipped: Counter[str] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    genres = _genre_names(items.with_name("u.genre"))
    flags = [f"genre {number}" for number in range(len(genres))]
    names = ("item_id", "title", "release_date", "video_release_date", "url", *flags)
    movies = _movies(items, Dialect("|", False, names, "latin-1"), ("item_id", "title", *flags), skipped)
    named = [pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, genres)]
    movies = movies.select("item_id", "title", genres=pl.concat_list(named).list.drop_nulls())
    return _ratings(ratings, Dialect("\t", False, _NAMES), _NAMES, skipped), movies


def _genre_names(path: Path) -> list[str]:
    """The file's lines are `name|number`, in the order of the flags in `u.item`."""
    if not path.is_file():
        raise UserError(f"'{path.parent}' has no {path.name}: unpack the whole archive.")
    names = [line.split("|")[0] for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path} is empty: unpack the archive again.")
    return names


def _read_dat(ratings: Path, items: Path, skipped: Counter[str] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    names = ("item_id", "title", "genres")
    movies = _movies(items, Dialect("::", False, names, _encoding(items)), names, skipped)
    interactions = _ratings(ratings, Dialect("::", False, _NAMES), _NAMES, skipped)
    return interactions, movies.with_columns(_genres())


def _read_csv(ratings: Path, items: Path, skipped: Counter[str] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    interactions = _ratings(ratings, None, ("userId", "movieId", "rating", "timestamp"), skipped)
    movies = _movies(items, None, ("movieId", "title", "genres"), skipped)
    return interactions, movies.with_columns(_genres())


def _genres() -> pl.Expr:
    return pl.col("genres").replace("(no genres listed)", None).str.split("|")


def _ratings(path: Path, dialect: Dialect | None, names: Sequence[str], skipped: Counter[str] | None) -> pl.DataFrame:
    frames = read_table(path, dict(zip(_NAMES, names)), dialect=dialect, skipped=skipped)
    return check_interactions(frames, path, skipped=skipped)


def _movies(path: Path, dialect: Dialect | None, names: Sequence[str], skipped: Counter[str] | None) -> pl.DataFrame:
    frames = list(read_table(path, {name: name for name in names}, dialect=dialect, skipped=skipped))
    if not frames:
        raise UserError(f"{path} is empty: unpack the archive again.")
    return checked_items(pl.concat(frames).rename({names[0]: "item_id"}), path, skipped).select("item_id", *names[1:])


def _encoding(path: Path) -> str:
    """1M is Latin-1, 10M is UTF-8."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


KIND = Kind(import_movielens, "input=folder skip_bad_rows")
