"""Amazon Reviews 2023: any category, raw or benchmark files, from the hub, the authors' server or a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from r2ec_trl.data.sources.delimited import column_names, read_table
from r2ec_trl.data.sources.download import Progress, download
from r2ec_trl.data.sources.jsonl import ROW, Schema, read_jsonl
from r2ec_trl.data.sources.source import (
    MISSING,
    SPLIT_CODES,
    Kind,
    Source,
    check_interactions,
    check_same_ids,
    checked_ids,
)
from r2ec_trl.errors import UserError, first_line
from r2ec_trl.progress import report

HUB = "McAuley-Lab/Amazon-Reviews-2023"
AUTHORS_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
REVIEWS = ("raw", "0core", "5core", "0core_last_out", "5core_last_out", "0core_timestamp", "5core_timestamp")
DOWNLOADS = "~/.cache/r2ec_trl/amazon_2023"
FIELDS = ("description", "features", "categories", "store", "price")

_COLUMNS = {"user_id": "user_id", "item_id": "parent_asin", "rating": "rating", "timestamp": "timestamp"}
_META: Schema = {
    "parent_asin": pl.String,
    "title": pl.String,
    "subtitle": pl.String,
    "main_category": pl.String,
    "description": pl.List(pl.String),
    "features": pl.List(pl.String),
    "categories": pl.List(pl.String),
    "store": pl.String,
    "price": pl.String,
    "average_rating": pl.String,
    "rating_number": pl.String,
}
_PARTS = {"train": "train", "validation": "valid", "test": "test"}


def import_amazon(
    category: str,
    where: str | os.PathLike[str] = "hub",
    *,
    reviews: str = "5core",
    download_dir: str | os.PathLike[str] = DOWNLOADS,
    skip_bad_rows: bool = False,
    progress: Progress | None = report,
) -> Source:
    """
    Read one category of Amazon Reviews 2023. Times are in milliseconds; items are told apart by `parent_asin`.

    Args:
        category (`str`):
            As in the file names, such as `Video_Games`.
        where (`str` or `os.PathLike`, *optional*, defaults to `"hub"`):
            `"hub"`, a URL laid out like [`AUTHORS_URL`] (`"authors"` is short for it), or a folder: laid out the same,
            or with the files side by side, as `.jsonl`, `.csv` (each also `.gz`) or `.parquet`.
        reviews (`str`, *optional*, defaults to `"5core"`):
            `"raw"` (all reviews), `"0core"` (the first of each user and item) or `"5core"`; with `_last_out` or
            `_timestamp` the benchmark's own splits, for the split rule `given`.
        download_dir (`str` or `os.PathLike`, *optional*, defaults to `"~/.cache/r2ec_trl/amazon_2023"`):
            Where files fetched by URL are kept; the hub has its own cache.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Leave bad rows out and count them.
        progress (`Callable`, *optional*, defaults to [`~r2ec_trl.progress.report`]):
            Told about downloads by URL.
    """
    if reviews not in REVIEWS:
        raise UserError(f"--reviews {reviews!r} is unknown: choose one of {', '.join(REVIEWS)}.")
    dropped: Counter[str] = Counter()
    skipped = dropped if skip_bad_rows else None
    found = []
    for split, name in review_files(category, reviews).items():
        path = locate(name, where, download_dir, progress)
        frame = check_interactions(read_table(path, _COLUMNS, skipped=skipped), path, skipped=skipped, unit="ms")
        if split:
            frame = frame.with_columns(pl.lit(SPLIT_CODES[split], dtype=pl.Int8).alias("split"))
        found.append(frame)
    interactions = pl.concat(found)
    path = locate(f"raw/meta_categories/meta_{category}.jsonl", where, download_dir, progress)
    items = _read_metadata(path, interactions["item_id"].unique(), skipped, dropped)
    fields = tuple(name for name in FIELDS if name in items.columns)
    check_same_ids(interactions, items, f"{category} ({reviews})", path)
    return Source(f"amazon 2023: {category}, {reviews}", interactions, items, 1_000, dropped, fields)


def review_files(category: str, reviews: str) -> dict[str, str]:
    """From split (empty if there is one file) to the path below the dataset's root."""
    if reviews == "raw":
        return {"": f"raw/review_categories/{category}.jsonl"}
    core, _, split = reviews.partition("_")
    if not split:
        return {"": f"benchmark/{core}/rating_only/{category}.csv"}
    return {name: f"benchmark/{core}/{split}/{category}.{word}.csv" for name, word in _PARTS.items()}


def locate(
    name: str,
    where: str | os.PathLike[str],
    download_dir: str | os.PathLike[str],
    progress: Progress | None = None,
) -> Path:
    """The local path of one of the dataset's files, fetched first where it is not local."""
    address = AUTHORS_URL if where == "authors" else str(where)
    if address == "hub":
        return _from_hub(name)
    if address.startswith(("http://", "https://")):
        return download(
            f"{address.rstrip('/')}/{name}.gz", Path(download_dir).expanduser() / f"{name}.gz", progress=progress
        )
    folder, plain = Path(where), Path(name)
    stem = plain.name.removesuffix(plain.suffix)
    for candidate in (name, f"{name}.gz", plain.name, f"{plain.name}.gz", f"{stem}.parquet"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"'{folder}' has no {plain.name} (nor .gz, nor {stem}.parquet, nor {name}): check --input and --reviews."
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(hf_hub_download(HUB, name, repo_type="dataset"))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"The hub cannot be reached for {name}: try --input authors, or a folder of the files."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{HUB} on the hub has no {name}: check --amazon_category and --reviews.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"The hub gives no {name} ({first_line(error)}): try --input authors, or a folder of the files."
        ) from error


def _read_metadata(path: Path, wanted: pl.Series, skipped: Counter[str] | None, dropped: Counter[str]) -> pl.DataFrame:
    """The metadata of the items that occur, block by block: a category's whole metadata may not fit into memory."""
    kept = []
    for frame in _metadata_blocks(path, skipped):
        mine = frame.filter(pl.col("item_id").is_in(wanted.implode()))
        dropped["metadata of an item nobody bought"] += frame.height - mine.height
        kept.append(mine.drop(ROW))
    if not kept:
        raise UserError(f"{path} is empty: fetch the file again.")
    return pl.concat(kept)


def _metadata_blocks(path: Path, skipped: Counter[str] | None) -> Iterator[pl.DataFrame]:
    if path.suffix == ".parquet":
        has = column_names(path)
        optional = [name for name in _META if name not in ("parent_asin", "title")]
        columns = {name: name for name in _META if name in has or name not in optional}
        frames = read_table(path, columns, skipped=skipped)
    else:
        frames = read_jsonl(path, _META, skip_bad_rows=skipped is not None, dropped=skipped)
    for frame in frames:
        frame = checked_ids(frame, ("parent_asin",), path, skipped).rename({"parent_asin": "item_id"})
        yield frame.with_columns(_null_for_none(name, kind) for name, kind in frame.schema.items())


def _null_for_none(name: str, kind: pl.DataType) -> pl.Expr:
    """Copies made through pandas hold the word None where nothing is known."""
    column = pl.col(name)
    return column if kind != pl.String else pl.when(~column.is_in(MISSING)).then(column).alias(name)


KIND = Kind(
    import_amazon, "amazon_category=category input=where reviews download_dir skip_bad_rows", ("amazon_category",)
)
