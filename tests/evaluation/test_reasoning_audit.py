"""Several ways to reason on the same users: figures by hand, differences paired, modes that are none refused."""

import polars as pl
import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.reasoning_audit import audit_modes, audit_reasoning, split_mode


def frame(ranks, tokens=2, **more):
    users = [f"u{i}" for i in range(len(ranks))]
    columns = {"user_id": users, "rank": ranks, "rank_masked": [rank + 1 for rank in ranks]}
    return pl.DataFrame(
        {**columns, "reasoning_tokens": [tokens] * len(ranks), "has_marker": [True] * len(ranks), **more}
    )


def test_modes():
    assert split_mode("first:8") == ("first", 8) and split_mode("other") == ("other", 0)
    assert audit_modes(16) == ["none", "first:4", "first:8", "full", "other", "best:8"]
    assert all(split_mode(mode) for mode in audit_modes(512))


@pytest.mark.parametrize(
    "mode", ["first", "first:", "first:0", "first:-1", "best:x", "full:2", "", "first:²", "worst:2"]
)
def test_what_is_no_mode_is_refused(mode):
    with pytest.raises(UserError, match="give one or more of full, none"):
        split_mode(mode)


def test_figures_and_differences_by_hand():
    """NDCG@10 of ranks 1, 3 and 11: 1, .5 and 0."""
    frames = {"none": frame([11, 11, 3], tokens=0), "full": frame([1, 3, 11]), "best:2": frame([1, 1, 11], tokens=3)}
    ranks = {"rank": [[1, 3], [1, 11], [11, 11]], "rank_masked": [[1, 3], [1, 1], [1, 1]]}
    samples = {"best:2": pl.DataFrame({**ranks, "reasoning_tokens": [5, 7, 9]})}
    beside = {"other model": frame([3, 3, 3]).drop("reasoning_tokens", "has_marker")}
    found = audit_reasoning(frames, {"none": 0.1, "full": 0.4, "best:2": 3.0}, samples, beside)
    assert [one["unmasked"]["value"] for one in found.values()] == pytest.approx([0.5 / 3, 0.5, 2 / 3, 0.5])
    assert found["full"]["unmasked"]["minus_none"]["difference"] == pytest.approx(1 / 3)
    assert found["none"]["unmasked"]["minus_full"]["difference"] == pytest.approx(-1 / 3)
    assert "minus_none" not in found["none"]["unmasked"] and "minus_full" not in found["full"]["unmasked"]
    best = found["best:2"]["unmasked"]
    assert best["mean"] == pytest.approx((0.75 + 0.5 + 0) / 3) and best["oracle"] == pytest.approx(2 / 3)
    assert best["minus_mean"]["difference"] == pytest.approx(2 / 3 - 1.25 / 3)
    assert best["low"] <= best["value"] <= best["high"]
    assert found["full"]["tokens"] == 2 and found["best:2"]["seconds"] == 3.0
    assert found["best:2"]["tokens"] == 7  # of both samples
    assert found["other model"]["seconds"] is None and found["other model"]["missing_marker"] is None
    assert found["full"]["masked"]["value"] < 0.5
