"""From targets to rows: windows cut out of the sorted interactions in blocks, never one user at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .events import Events
from .splits import Targets, first_of_user

BLOCK_ROWS = 200_000


def write_rows(targets: Targets, path: str | os.PathLike[str], max_history: int) -> Dataset:
    """
    Write the rows of a split to an Arrow file and open it memory-mapped.

    Args:
        targets ([`~r2ec_trl.data.splits.Targets`]):
            Targets and the events before them.
        path (`str` or `os.PathLike`):
            File to write.
        max_history (`int`):
            Longest history: the last so many interactions before the target.
    """
    events = targets.events
    user_ids, item_ids = (ids.to_arrow().cast(pa.string()) for ids in (events.user_ids, events.item_ids))
    first = first_of_user(events.user)
    with pa.OSFile(str(path), "wb") as file:
        writer: pa.RecordBatchStreamWriter | None = None
        for at in range(0, max(len(targets.positions), 1), BLOCK_ROWS):
            batch = _block(events, targets.positions[at : at + BLOCK_ROWS], first, max_history, user_ids, item_ids)
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        assert writer is not None
        writer.close()
    return Dataset.from_file(str(Path(path)))


def _block(
    events: Events,
    positions: np.ndarray,
    first: np.ndarray,
    max_history: int,
    user_ids: pa.Array,
    item_ids: pa.Array,
) -> pa.RecordBatch:
    lengths = np.minimum(positions - first[positions], max_history)
    offsets = np.zeros(len(positions) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # Position of every history item: each window runs up to its target.
    flat = np.arange(offsets[-1]) + np.repeat(positions - lengths - offsets[:-1], lengths)

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(pa.field("item", values.type)))

    def seconds(at: np.ndarray) -> pa.Array:
        return pa.array(events.time[at] // events.ticks_per_second)

    columns = {
        "user_id": pc.take(user_ids, pa.array(events.user[positions])),
        "history": lists(pc.take(item_ids, pa.array(events.item[flat]))),
        "target": pc.take(item_ids, pa.array(events.item[positions])),
    }
    if events.rating is not None:
        columns["history_ratings"] = lists(pa.array(events.rating[flat]))
    columns["history_timestamps"] = lists(seconds(flat))
    columns["timestamp"] = seconds(positions)
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
