"""Comparisons by hand; that their intervals and p values keep what they promise is in tests/test_intervals.py."""

import polars as pl
import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.comparison import compare_frames, compare_runs, differences
from r2ec_trl.evaluation.report import protocol

CARD = {"source": "shop", "sha256": {"test": "aa", "items": "bb"}, "counts": {"test": 4, "items": 9}}
# One user with ten rows, ten with one each
HEAVY = {"user_id": ["heavy"] * 10 + [f"light{row}" for row in range(10)], "target": ["a"] * 20}


def frame(rank=(1, 3, 2, 10), rank_masked=(1, 10, 2, 9)):
    return pl.DataFrame({"user_id": list("uuvw"), "target": list("abac"), "rank": rank, "rank_masked": rank_masked})


def made(**settings):
    return protocol(CARD, {"reasoning": "full", **settings}, seed=3)


def test_differences_of_settings_are_listed():
    other = protocol(CARD, {"reasoning": "none", "lora": {"r": 4}}, seed=4)
    assert differences(made(), other) == {
        "seed": (3, 4),
        "settings.lora.r": (None, 4),
        "settings.reasoning": ("full", "none"),
    }
    assert differences(made(), made()) == {}


@pytest.mark.parametrize(
    "change", [{"split": "validation"}, {"split_sha256": "cc"}, {"catalogue_sha256": "cc"}, {"ties": "in favour"}]
)
def test_another_protocol_is_refused(change):
    with pytest.raises(UserError, match=f"differ in {next(iter(change))}"):
        differences(made(), {**made(), **change})


def test_comparison_by_hand():
    """
    Hit@1 goes from 1 of 4 to 3 of 4. Masked it goes from 1 to 0 of 4: u, with two rows, is drawn k times of 3, which
    makes -k / (3 + k), and k = 3 is in 1/27 of the draws, k = 0 in 8/27: the interval is [-.5, 0].
    """
    result = compare_frames(frame(), frame(rank=(1, 1, 1, 10), rank_masked=(10, 10, 2, 9)), ks=[1])
    assert (result["rows"], result["users"]) == (4, 3)
    figure = result["unmasked"]["hit@1"]
    assert (figure["before"], figure["after"], figure["difference"]) == (0.25, 0.75, 0.5)
    assert 0 <= figure["low"] <= 0.5 <= figure["high"] <= 1
    masked = {"before": 0.25, "after": 0.0, "difference": -0.25, "low": -0.5, "high": 0.0, "p": 1.0, "p_holm": 1.0}
    assert result["masked"]["hit@1"] == masked


def test_a_comparison_draws_users_with_all_their_rows_and_by_its_seed():
    """One user gains all ten hits: as rows, no gain at all would be in (1/2)^20 of the draws."""
    before, after = (
        pl.DataFrame({**HEAVY, "rank": ranks, "rank_masked": ranks}) for ranks in ([9] * 20, [1] * 10 + [9] * 10)
    )
    figure = compare_frames(before, after, ks=[1])["unmasked"]["hit@1"]
    assert (figure["difference"], figure["low"], figure["high"]) == (0.5, 0.0, pytest.approx(30 / 38))
    assert figure["p"] == 1  # one user's sign: as far from 0 either way
    rows = pl.concat([frame(rank=(1, 3, 9, 10))] * 50)
    rows = rows.with_columns(user_id=pl.Series([f"u{row}" for row in range(200)]))
    worse = rows.with_columns(rank=pl.Series([(7 * row) % 10 + 1 for row in range(200)]))
    one, again, other = (compare_frames(rows, worse, ks=[5], seed=seed)["unmasked"]["ndcg@5"] for seed in (0, 0, 1))
    assert one == again and one["difference"] == other["difference"]
    assert one["low"] != other["low"] and one["p"] != other["p"] and 0.01 < one["p"] < 0.99


@pytest.mark.parametrize("other", [frame()[:3], frame()[::-1], frame().with_columns(user_id=pl.lit("x"))])
def test_other_rows_are_refused(other):
    with pytest.raises(UserError, match="not of the same users and targets"):
        compare_frames(frame(), other)
    with pytest.raises(UserError, match="not of the same users and targets"):
        compare_runs([frame(), other], {"same": [frame()]}, ["hit@1"])


def test_a_run_and_itself():
    for metrics in (["ndcg@10"], ["hit@1", "mrr@5"]):
        found = compare_runs([frame()] * 2, {"same": [frame()] * 3, "once": [frame()]}, metrics)
        for masks in found["systems"].values():
            for figures in masks.values():
                for figure in figures.values():
                    zeros = [figure[name] for name in ("difference", "low", "high")]
                    assert zeros == pytest.approx([0, 0, 0], abs=1e-15) and figure["p"] == figure["p_holm"] == 1
    alone = compare_runs([frame()], {"same": [frame()]}, ["ndcg@10"])["systems"]["same"]["masked"]["ndcg@10"]
    assert [alone[name] for name in ("difference", "low", "high", "p")] == [0, 0, 0, 1]
    assert found["runs"] == {"before": 2, "same": 3, "once": 1} and found["family"] == 8


def test_seeds_by_hand():
    """
    Every row is a hit in two of four seeds and a miss in the others; the reference always misses. Users are all alike,
    so that the interval is that of the mean of three seeds drawn: 0 or 1 in 1/8 of the draws each.
    """
    users = {"user_id": [f"u{row}" for row in range(20)], "target": ["a"] * 20}
    hit, miss = (pl.DataFrame({**users, "rank": [rank] * 20, "rank_masked": [rank] * 20}) for rank in (1, 99))
    found = compare_runs([miss], {"seeds": [hit, miss, hit, miss]}, ["hit@10"])["systems"]["seeds"]["masked"]["hit@10"]
    assert (found["before"], found["after"], found["difference"], found["low"], found["high"]) == (0, 0.5, 0.5, 0, 1)
    alone = compare_runs([miss], {"one": [hit]}, ["hit@10"])["systems"]["one"]["masked"]["hit@10"]
    assert (alone["low"], alone["high"]) == (1, 1) and alone["p"] == pytest.approx(1 / 10_001, rel=9)


def test_holm_is_over_all_that_is_shown():
    rows = pl.concat([frame()] * 5).with_columns(user_id=pl.Series([f"u{row}" for row in range(20)]))
    better = rows.with_columns(rank=pl.lit(1), rank_masked=pl.col("rank"))
    found = compare_runs([rows], {"better": [better], "same": [rows]}, ["hit@1"])["systems"]
    figures = [figure for masks in found.values() for of in masks.values() for figure in of.values()]
    assert len(figures) == 4 and found["better"]["unmasked"]["hit@1"]["p"] < 0.001
    assert found["better"]["unmasked"]["hit@1"]["p_holm"] == pytest.approx(
        4 * found["better"]["unmasked"]["hit@1"]["p"]
    )
    with pytest.raises(UserError, match="`auc` is no metric; give hit, ndcg, mrr with a cutoff"):
        compare_runs([rows], {"same": [rows]}, ["auc"])
    with pytest.raises(UserError, match="The cutoff is 0"):
        compare_runs([rows], {"same": [rows]}, ["hit@0"])
