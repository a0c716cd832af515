"""Metrics by hand and against torchmetrics; bootstrap intervals against the textbook."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from r2ec_trl.errors import UserError
from r2ec_trl.metrics import (
    bootstrap_interval,
    hit_at_k,
    holm,
    metric_values,
    ndcg_at_k,
    paired_bootstrap,
    reciprocal_rank,
    sign_flip_p,
    summarise_ranks,
)


def test_hand_worked():
    """1/log2(2) = 1, 1/log2(4) = 1/2, 1/log2(8) = 1/3, and nothing past the cutoff."""
    assert hit_at_k([1, 3, 7, 11], 10).tolist() == [1, 1, 1, 0]
    assert ndcg_at_k([1, 3, 7, 11], 10).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert reciprocal_rank([1, 3, 7, 11], 10).tolist() == pytest.approx([1, 1 / 3, 1 / 7, 0])
    assert reciprocal_rank([11]).tolist() == pytest.approx([1 / 11])


def test_cutoff_one_and_cutoffs_beyond_the_catalogue():
    """Mistake 7: at k = 1 only rank 1 counts, as 1; a cutoff of 1000 over 3 items cuts nothing."""
    for metric in (hit_at_k, ndcg_at_k, reciprocal_rank):
        assert metric([1, 2], 1).tolist() == [1, 0]
    assert ndcg_at_k([1, 2, 3], 1000).tolist() == pytest.approx([1, 1 / np.log2(3), 1 / 2])


@pytest.mark.parametrize("num_items", [3, 50])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_agrees_with_torchmetrics(num_items, k):
    generator = torch.Generator().manual_seed(num_items + k)
    for _ in range(40):
        scores = 1.0 + torch.randperm(num_items, generator=generator)  # torchmetrics ignores scores of 0
        target = torch.randint(num_items, (1,), generator=generator)
        relevant = torch.arange(num_items) == target
        rank = 1 + int((scores > scores[target]).sum())
        assert hit_at_k([rank], k)[0] == pytest.approx(retrieval_hit_rate(scores, relevant, top_k=k).item())
        assert ndcg_at_k([rank], k)[0] == pytest.approx(retrieval_normalized_dcg(scores, relevant, top_k=k).item())
        assert reciprocal_rank([rank], k)[0] == pytest.approx(
            retrieval_reciprocal_rank(scores, relevant, top_k=k).item()
        )
        assert reciprocal_rank([rank])[0] == pytest.approx(retrieval_reciprocal_rank(scores, relevant).item())


@given(ranks=st.lists(st.integers(1, 10**9), min_size=1, max_size=50), k=st.integers(1, 2000))
def test_bounds_and_order(ranks, k):
    """0 <= MRR <= NDCG <= Hit <= 1 row by row, a larger cutoff never lowers a metric, a better rank neither."""
    hit, ndcg, mrr = hit_at_k(ranks, k), ndcg_at_k(ranks, k), reciprocal_rank(ranks, k)
    assert ((0 <= mrr) & (mrr <= ndcg) & (ndcg <= hit) & (hit <= 1)).all()
    for metric in (hit_at_k, ndcg_at_k, reciprocal_rank):
        assert (metric(ranks, k + 1) >= metric(ranks, k)).all()
        assert (np.diff(metric(sorted(ranks), k)) <= 0).all()


def test_float64_whatever_comes_in():
    for ranks in ([1, 2], np.array([1, 2], dtype=np.int32), torch.tensor([1, 2])):
        assert ndcg_at_k(ranks, 10).dtype == np.float64


def test_summary():
    assert summarise_ranks([1, 3], ks=[2]) == {"hit@2": 0.5, "ndcg@2": 0.5, "mrr@2": 0.5}
    assert list(summarise_ranks([1])) == [f"{name}@{k}" for k in (5, 10, 20) for name in ("hit", "ndcg", "mrr")]
    assert {name: values.tolist() for name, values in metric_values([3, 9], [5]).items()} == {
        "hit@5": [1.0, 0.0],
        "ndcg@5": [0.5, 0.0],
        "mrr@5": [1 / 3, 0.0],
    }


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hit_at_k([1], 0), UserError, "cutoff is 0"),
        (lambda: ndcg_at_k([0], 5), ValueError, "1-based"),
        (lambda: reciprocal_rank([float("nan")]), ValueError, "1-based"),
        (lambda: summarise_ranks([]), UserError, "no ranks"),
        (lambda: bootstrap_interval([]), UserError, "at least one row"),
        (lambda: bootstrap_interval([1.0, float("nan")]), UserError, "finite"),
        (lambda: bootstrap_interval([1.0], level=1.0), UserError, "level is 1.0"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), UserError, "same rows"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_interval_of_a_constant_and_of_one_row():
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_interval_is_that_of_drawn_rows():
    """Counting how often each value is drawn is the same bootstrap as drawing the rows themselves."""
    values = np.repeat([0.0, 0.5, 1.0], [60, 30, 10])
    generator = np.random.default_rng(1)
    means = values[generator.integers(100, size=(20_000, 100))].mean(axis=1)
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_interval_of_many_rows_is_the_normal_one():
    """For n = 4000 the 95 % interval is the mean plus or minus 1.96 standard errors."""
    values = np.random.default_rng(0).random(4000)
    error = values.std() / np.sqrt(4000)
    expected = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    assert bootstrap_interval(values, resamples=4000) == pytest.approx(expected, abs=0.1 * error)


def test_rows_of_one_group_are_drawn_together():
    """One user with ten hits and ten users with one miss each: the mean is .5, and as rows it rarely leaves .28-.72.

    As users the one is drawn 0, 1, 2.. times among 11: from 0/11 hits to, three times, 30/38.
    """
    values, users = [1.0] * 10 + [0.0] * 10, ["heavy"] * 10 + [f"light{user}" for user in range(10)]
    low, high = bootstrap_interval(values)
    assert 0.2 < low < 0.35 and 0.65 < high < 0.8
    low, high = bootstrap_interval(values, groups=users)
    assert low == 0 and high == pytest.approx(30 / 38)


def test_groups_of_one_row_change_nothing():
    values = np.random.default_rng(0).random(30)
    assert bootstrap_interval(values, groups=np.arange(30)) == bootstrap_interval(values)


def test_interval_repeats_with_its_seed_and_narrows_with_its_level():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    low, high = bootstrap_interval(values, level=0.5)
    wide_low, wide_high = bootstrap_interval(values)
    assert wide_low < low < values.mean() < high < wide_high


def test_paired_interval_is_narrower_than_its_sides():
    """Two runs that differ by .1 on every user differ by exactly .1, however much the users vary."""
    before = np.random.default_rng(0).random(100)
    result = paired_bootstrap(before + 0.1, before)
    assert result == pytest.approx({"difference": 0.1, "low": 0.1, "high": 0.1})


def test_runs_are_drawn_one_less_than_there_are_and_each_side_by_itself():
    """
    One run of five hits, whoever the user: of four drawn, at most two hit in .9728 of the draws, at most three in
    .9984, so the 98 % quantile is 3/4 (five drawn: 3/5). Against five such runs, drawn apart from these, the
    difference is at least 2/4 in .0855 of the draws and at least 3/4 in .0118.
    """
    runs, nothing = np.zeros((5, 20)), np.zeros(20)
    runs[3] = 1
    found = paired_bootstrap(runs, nothing, level=0.96)
    assert found == pytest.approx({"difference": 0.2, "low": 0.0, "high": 0.75})
    assert paired_bootstrap(nothing, runs, level=0.96) == pytest.approx({"difference": -0.2, "low": -0.75, "high": 0})
    assert paired_bootstrap(runs, runs, level=0.96) == pytest.approx({"difference": 0, "low": -0.5, "high": 0.5})


def test_holm_by_hand():
    """Smallest times 3, the next times 2, the last times 1, and none below the one before; never above 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_sign_flips_repeat_with_their_seed():
    differences = np.random.default_rng(0).normal(0.2, 1, 30)
    one, again, other = (sign_flip_p(differences, seed=seed) for seed in (0, 0, 1))
    assert one == again != other == pytest.approx(one, abs=0.03)


def test_a_p_is_never_0():
    """What was measured counts as one of the flips: of 99 draws none is as far as 60 differences of one sign."""
    assert sign_flip_p([1.0] * 60, resamples=99) == 1 / 100


def test_a_group_flips_as_one():
    """One user's 60 rows are one draw of a sign, which decides nothing; two users of 30 give each of four results."""
    assert sign_flip_p([1.0] * 60, groups=["u"] * 60) == 1
    assert sign_flip_p([1.0] * 60, groups=["u", "v"] * 30) == pytest.approx(0.5, abs=0.03)
