"""Raw files shaped like Amazon Reviews 2023, of any size, for benchmarks and tests: all invented."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import polars as pl

CATEGORY = "Generated"
_WORDS = (
    "sturdy light compact steel wooden blue black large small travel kitchen garden office guitar cable stand case"
)
_FIRST_MS, _LAST_MS = 1_500_000_000_000, 1_690_000_000_000


def generate_amazon(
    folder: str | os.PathLike[str],
    interactions: int,
    users: int,
    items: int,
    *,
    kind: str = "parquet",
    seed: int = 0,
) -> Path:
    """
    Write the ratings and metadata of an invented category, as `import_amazon("Generated", folder)` reads them.

    Every user has at least five interactions, so that a 5-core leaves most; items are bought with Zipf-like frequency.
    Times are in milliseconds and differ within a user.

    Args:
        folder (`str` or `os.PathLike`):
            Folder to fill.
        interactions, users, items (`int`):
            How many; the interactions at least five times the users.
        kind (`str`, *optional*, defaults to `"parquet"`):
            `"parquet"`, `"csv.gz"` (the benchmark's files) or `"jsonl.gz"` (the raw ones).
        seed (`int`, *optional*, defaults to 0):
            Of the generator.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    ratings = _ratings(random, interactions, users, items)
    if kind == "parquet":
        ratings.write_parquet(folder / f"{CATEGORY}.parquet")
    elif kind == "csv.gz":
        _packed(folder / f"{CATEGORY}.csv.gz", ratings.write_csv().encode())
    else:
        text = pl.col("parent_asin").alias("title"), pl.lit("Works as it should. " * 10).alias("text")
        raw = ratings.with_columns(
            *text, verified_purchase=True, helpful_vote=0, images=pl.lit([], pl.List(pl.String))
        )
        _packed(folder / f"{CATEGORY}.jsonl.gz", raw.write_ndjson().encode())
    metadata = _metadata(random, items)
    if kind == "parquet":
        metadata.write_parquet(folder / f"meta_{CATEGORY}.parquet")
    else:
        _packed(folder / f"meta_{CATEGORY}.jsonl.gz", metadata.write_ndjson().encode())
    return folder


def _ratings(random: np.random.Generator, interactions: int, users: int, items: int) -> pl.DataFrame:
    activity = random.pareto(2.0, users) + 0.1
    extra = random.multinomial(interactions - 5 * users, activity / activity.sum())
    user = np.repeat(np.arange(users), 5 + extra)
    popularity = 1 / np.arange(5, items + 5) ** 0.8
    item = random.permutation(items)[
        np.searchsorted(np.cumsum(popularity / popularity.sum()), random.random(len(user)))
    ]
    # Distinct within a user: the position of the row is in the last digits.
    time = random.integers(_FIRST_MS // 1_000_000, _LAST_MS // 1_000_000, len(user)) * 1_000_000
    time += np.arange(len(user)) % 1_000 * 1_000 + random.integers(0, 1_000, len(user))
    order = random.permutation(len(user))
    frame = pl.DataFrame({"user": user[order], "item": item[order], "timestamp": time[order]})
    return frame.select(
        user_id=pl.format("AG{}XQ7ZL2KJ4M5NP6RSTUVWXYZA", pl.col("user").cast(pl.String).str.zfill(8)),
        parent_asin=pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)),
        rating=pl.Series(random.integers(1, 6, len(user)).astype(float)),
        timestamp="timestamp",
    )


def _metadata(random: np.random.Generator, items: int) -> pl.DataFrame:
    words = np.array(_WORDS.split())
    picks = words[random.integers(0, len(words), (items, 6))]
    title = pl.Series([" ".join(row) for row in picks.tolist()])
    number = pl.Series(np.arange(items)).cast(pl.String)
    frame = pl.DataFrame({"title": title, "number": number, "price": np.round(random.random(items) * 100, 2)})
    return frame.select(
        parent_asin=pl.format("B{}", pl.col("number").str.zfill(9)),
        title=pl.format("{} {}", "title", "number"),
        price="price",
        average_rating=pl.lit(4.1),
        rating_number=pl.lit(12),
        store=pl.lit("Fenta"),
        description=pl.concat_list(pl.format("A {} for every day, &amp; more.", "title")),
        features=pl.concat_list("title"),
        categories=pl.concat_list(pl.lit("Shop"), pl.lit("All")),
    )


def _packed(path: Path, content: bytes) -> None:
    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as file:
        file.write(content)
