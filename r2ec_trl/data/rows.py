"""From targets to rows: windows cut out of the sorted interactions in blocks, never one user at a time."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from r2ec_trl.data.events import Events
from r2ec_trl.data.schema import BLOCK_ROWS
from r2ec_trl.data.splits import Targets, first_of_user


def write_rows(targets: Targets, path: str | os.PathLike[str], max_history: int) -> Dataset:
    """Write a split's rows, histories of the last `max_history` interactions, to an Arrow file, and open it mapped."""
    events, positions = targets
    user_ids, item_ids = (ids.to_arrow().cast(pa.string()) for ids in (events.user_ids, events.item_ids))
    first = first_of_user(events.user)
    starts = np.maximum(first[positions], positions - max_history)
    events = replace(events, time=events.time // events.ticks_per_second, ticks_per_second=1)
    batches = (
        _block(events, positions[at : at + BLOCK_ROWS], starts[at : at + BLOCK_ROWS], user_ids, item_ids)
        for at in range(0, len(positions), BLOCK_ROWS)
    )
    with pa.OSFile(str(path), "wb") as file:
        head = next(batches)
        with pa.ipc.new_stream(file, head.schema) as writer:
            for batch in itertools.chain([head], batches):
                writer.write_batch(batch)
    return Dataset.from_file(str(Path(path)))


def _block(
    events: Events, positions: np.ndarray, starts: np.ndarray, user_ids: pa.Array, item_ids: pa.Array
) -> pa.RecordBatch:
    """Rows of some targets; the times of `events` are in seconds."""
    lengths = positions - starts
    offsets = np.zeros(len(positions) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # Position of every history item: each window runs up to its target.
    flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(pa.field("item", values.type)))

    columns = {
        "user_id": pc.take(user_ids, pa.array(events.user[positions])),
        "history": lists(pc.take(item_ids, pa.array(events.item[flat]))),
        "target": pc.take(item_ids, pa.array(events.item[positions])),
    }
    if events.rating is not None:
        columns["history_ratings"] = lists(pa.array(events.rating[flat]))
    columns["history_timestamps"] = lists(pa.array(events.time[flat]))
    columns["timestamp"] = pa.array(events.time[positions])
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
