"""Hashes are the published ones, so they are the same everywhere."""

import numpy as np
import polars as pl

from r2ec_trl.data.stable_hash import mix, share_points, text_hashes


def test_fnv_1a_of_known_texts():
    """Test vectors of the FNV authors: "", "a", "foobar"."""
    known = [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]
    assert text_hashes(pl.Series(["", "a", "foobar"])).tolist() == known
    assert text_hashes(pl.Series(["x", "", "a", "foobar"])[1:]).tolist() == known  # a slice, with its offset


def test_splitmix_tells_neighbours_apart():
    mixed = mix(np.arange(4, dtype=np.uint64))
    assert mixed[0] == 0 and mixed[1] == 0x5692161D100B05E5 and len(set(mixed.tolist())) == 4


def test_points_of_users_are_even_and_their_own():
    users = pl.Series([f"u{number}" for number in range(4000)])
    points = share_points(users)
    assert points.min() >= 0 and points.max() < 1 and abs((points < 0.25).mean() - 0.25) < 0.02
    assert share_points(users[5:6])[0] == points[5]
