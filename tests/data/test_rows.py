"""A row is a target and the window before it."""

import numpy as np
import polars as pl

from r2ec_trl.data.events import sort_events
from r2ec_trl.data.rows import write_rows
from r2ec_trl.data.sources.source import Source
from r2ec_trl.data.splits import Targets


def test_windows_by_hand(tmp_path):
    """u bought a, b, c, d; the windows hold two at most, times are whole seconds of milliseconds."""
    rows = {
        "user_id": ["u"] * 4 + ["v"] * 2,
        "item_id": list("abcdab"),
        "timestamp": [1999, 2000, 3000, 4000, 500, 900],
        "rating": [1.0, 2.0, 3.0, 4.0, 5.0, 4.5],
    }
    source = Source("hand", pl.DataFrame(rows), pl.DataFrame({"item_id": list("abcd")}), ticks_per_second=1000)
    written = write_rows(Targets(sort_events(source), np.array([1, 3, 5])), tmp_path / "rows.arrow", max_history=2)
    assert written.to_list() == [
        {
            "user_id": "u",
            "history": ["a"],
            "target": "b",
            "history_ratings": [1.0],
            "history_timestamps": [1],
            "timestamp": 2,
        },
        {
            "user_id": "u",
            "history": ["b", "c"],
            "target": "d",
            "history_ratings": [2.0, 3.0],
            "history_timestamps": [2, 3],
            "timestamp": 4,
        },
        {
            "user_id": "v",
            "history": ["a"],
            "target": "b",
            "history_ratings": [5.0],
            "history_timestamps": [0],
            "timestamp": 0,
        },
    ]
