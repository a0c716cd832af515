"""What an evaluation leaves behind: figures with intervals, a rank per row, and the protocol inside both files."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.slices import TOP, beyond_accuracy, slices_of
from r2ec_trl.files import finite, write_json, write_with
from r2ec_trl.metrics import CUTOFFS, KINDS, PERCENT, RESAMPLES, bootstrap_interval, metric_values

METRICS_FILE = "metrics.json"
RANKS_FILE = "ranks.parquet"
logger = logging.getLogger(__name__)

MASKS = {"unmasked": "rank", "masked": "rank_masked"}  # name in the report -> column of the frame

_PROTOCOL_KEY = b"protocol"
_POLARS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)  # panic: a field's name that is no UTF-8
_COLUMNS = {"user_id": pl.String, "target": pl.String, "rank": pl.Int64, "rank_masked": pl.Int64}


def protocol(card: Mapping[str, Any], settings: Mapping[str, Any], seed: int, split: str = "test") -> dict[str, Any]:
    """How the figures came about, to be stored with them.

    Args:
        card (`Mapping[str, Any]`):
            Dataset card, with the counts and SHA-256 of each split.
        settings (`Mapping[str, Any]`):
            What the evaluation was called with: reasoning, lengths, similarity, temperature, model, adapter ...
        seed (`int`):
            Seed of the run.
        split (`str`, *optional*, defaults to `"test"`):
            The split that was evaluated.
    """
    return {
        "source": card["source"],
        "split": split,
        "split_sha256": card["sha256"][split],
        "catalogue_items": card["counts"]["items"],
        "catalogue_sha256": card["sha256"]["items"],
        "candidates": "the whole catalogue",
        "ties": "count against the target",
        "mask": "history items are removed; a target among them is a miss of rank N + 1",
        "intervals": f"{PERCENT} percentile bootstrap of users, {RESAMPLES:,} resamples",
        "seed": seed,
        "settings": json.loads(json.dumps(dict(settings), default=str)),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl", "peft", "r2ec_trl")},
    }


def report(
    frame: pl.DataFrame,
    baselines: Mapping[str, pl.DataFrame],
    protocol: Mapping[str, Any],
    ks: Sequence[int] = CUTOFFS,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Every metric of the model and the baselines, history masked and not, each with its bootstrap interval.

    Args:
        frame (`polars.DataFrame`):
            One row per example, with `user_id`, `rank` and `rank_masked`. The rows of a user are resampled together.
            With the columns of [`~r2ec_trl.evaluation.slices.describe_rows`] there are slices, too.
        baselines (`Mapping[str, polars.DataFrame]`):
            Name -> the same rows, in the same order, ranked by another system.
        protocol (`Mapping[str, Any]`):
            See [`protocol`].
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`):
            Cutoffs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        counts (`Mapping[str, int]`, *optional*):
            See [`~r2ec_trl.evaluation.slices.target_counts`]; with them there are figures beyond accuracy.

    Returns:
        `dict`: `protocol`, `rows`, `users`, and under `unmasked` and `masked`: system -> metric -> `value`, `low`,
        `high`. Under `slices`: slice -> bucket -> `rows` and, unless that is 0, the same of Hit@10 and NDCG@10. Under
        `beyond_accuracy`: system -> figure, history not masked.
    """
    users = frame["user_id"].to_numpy()
    systems = {"model": frame, **baselines}
    if lengths := [f"{name} {one.height}" for name, one in systems.items() if one.height != frame.height]:
        raise ValueError(f"A baseline has other rows than the {frame.height} of the model: {', '.join(lengths)}.")
    result: dict[str, Any] = {"protocol": dict(protocol), "rows": frame.height, "users": frame["user_id"].n_unique()}
    for mask, column in MASKS.items():
        result[mask] = {name: _figures(one[column].to_numpy(), ks, users, seed) for name, one in systems.items()}
    if slices := slices_of(frame):
        result["slices"] = {
            name: {bucket: _slice(systems, rows, users, seed) for bucket, rows in buckets.items()}
            for name, buckets in slices.items()
        }
    if counts is not None:
        result["beyond_accuracy"] = {
            name: beyond_accuracy(one["top_item_ids"].to_list(), counts)
            for name, one in systems.items()
            if "top_item_ids" in one.columns
        }
    return result


def _slice(systems: Mapping[str, pl.DataFrame], rows: np.ndarray, users: np.ndarray, seed: int) -> dict[str, Any]:
    """Hit@10 and NDCG@10 of some of the rows."""
    result: dict[str, Any] = {"rows": int(rows.sum())}
    for mask, column in MASKS.items() if rows.any() else ():
        ranks = {name: one[column].to_numpy()[rows] for name, one in systems.items()}
        result[mask] = {name: _figures(of, (TOP,), users[rows], seed, ("hit", "ndcg")) for name, of in ranks.items()}
    return result


def write_frame(file: str | os.PathLike, frame: pl.DataFrame, protocol: Mapping[str, Any]) -> None:
    """Write a frame as one Parquet file, whole or not at all, with the protocol in its metadata."""
    table = frame.to_arrow().replace_schema_metadata({_PROTOCOL_KEY: json.dumps(protocol)})
    write_with(file, lambda scratch: pq.write_table(table, scratch, write_page_checksum=True))


def read_frame(file: str | os.PathLike, fault: str) -> tuple[pl.DataFrame, Any]:
    """What [`write_frame`] wrote; `fault` is the sentence of the [`UserError`] where it is something else."""
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        table.validate(full=True)  # else polars crashes later on
        return pl.DataFrame(table), json.loads((table.schema.metadata or {})[_PROTOCOL_KEY])
    except (pa.ArrowException, *_POLARS, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(fault) from error


def write_report(folder: str | os.PathLike[str], report: Mapping[str, Any], frame: pl.DataFrame) -> None:
    """Write `ranks.parquet`, then `metrics.json`, each whole or not at all. A figure that is no number becomes null,
    with a warning, so that the others are kept.

    Args:
        folder (`str` or `os.PathLike`):
            Created if it is not there; files of an earlier report are replaced.
        report (`Mapping[str, Any]`):
            What goes into `metrics.json`. Its `protocol` goes into the metadata of `ranks.parquet` too.
        frame (`polars.DataFrame`):
            One row per example.
    """
    write_frame(Path(folder) / RANKS_FILE, frame, report["protocol"])
    wrong = [key for key, value in flat(report).items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        logger.warning("%s: %s is no finite number; written as null.", Path(folder) / METRICS_FILE, ", ".join(wrong))
    write_json(Path(folder) / METRICS_FILE, finite(report))


def read_ranks(folder: str | os.PathLike[str]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The frame and the protocol of a folder that [`write_report`] wrote."""
    file = Path(folder) / RANKS_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {RANKS_FILE}; recipes/evaluate.py writes one.")
    fault = f"{file} is not a ranks file with its protocol; evaluate again with recipes/evaluate.py."
    frame, found = read_frame(file, fault)
    missing = set(_COLUMNS) - set(frame.columns)
    if missing:
        raise UserError(f"{file} lacks the columns {', '.join(sorted(missing))}; evaluate again.")
    if not isinstance(found, dict) or frame.height == 0:
        what = "no rows" if frame.height == 0 else f"a protocol that is a {type(found).__name__}"
        raise UserError(f"{file} holds {what}; evaluate again.")
    for name, kind in _COLUMNS.items():
        column = frame[name]
        words = column.dtype == pl.String if kind == pl.String else column.dtype.is_integer()
        if not words or column.null_count() or (kind == pl.Int64 and int(column.min()) < 1):  # type: ignore[arg-type]
            wanted = "text" if kind == pl.String else "whole numbers from 1 up"
            raise UserError(
                f"{file}: the column {name} ({column.dtype}) must hold {wanted} in every row; evaluate again."
            )
    return frame.cast(_COLUMNS), found  # type: ignore[arg-type]


def _figures(
    ranks: ArrayLike, ks: Sequence[int], users: np.ndarray, seed: int, kinds: Sequence[str] = KINDS
) -> dict[str, dict[str, float]]:
    figures = {}
    for name, values in metric_values(ranks, ks, kinds).items():
        low, high = bootstrap_interval(values, seed=seed, groups=users)
        figures[name] = {"value": float(values.mean()), "low": low, "high": high}
    return figures


def flat(mapping: Mapping[str, Any], prefix: str = "", joint: str = ".") -> dict[str, Any]:
    """
    Nested keys joined, by dots unless `joint` is something else.

    >>> flat({"a": {"b": 1, "c": {"d": 2}}})
    {'a.b': 1, 'a.c.d': 2}
    """
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        found |= flat(value, name + joint, joint) if isinstance(value, Mapping) else {name: value}
    return found
