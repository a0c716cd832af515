"""
Intervals cover and p values are uniform, on simulated ranks whose difference is known. What a thousand comparisons
show is slow; a few show the same coarsely. `pytest -m slow tests/test_intervals.py -s` prints the shares.
"""

import numpy as np
import pytest

from r2ec_trl.metrics import ndcg_at_k, paired_bootstrap, sign_flip_p

ITEMS, K = 200, 10
GAIN = ndcg_at_k(np.arange(1, ITEMS + 1), K)


def chances(strength):
    """A rank's chances: rank r with a weight of r^-strength."""
    weights = np.arange(1, ITEMS + 1, dtype=float) ** -strength
    return weights / weights.sum()


def simulate(generator, users, before=1.0, after=1.25, shared=0.5):
    """
    NDCG@10 of users with one to four rows each, by two systems: a row's two ranks are the same quantile of each one's
    distribution in half of the rows, and rows of a user are alike, since half of them share the user's own quantile.
    """
    groups = np.repeat(np.arange(users), generator.integers(1, 5, users))
    own = generator.random(users)[groups]
    quantile = np.where(generator.random(groups.size) < 0.5, own, generator.random(groups.size))
    other = np.where(generator.random(groups.size) < shared, quantile, generator.random(groups.size))
    ranks = [
        1 + np.searchsorted(np.cumsum(chances(strength))[:-1], drawn)
        for strength, drawn in ((before, quantile), (after, other))
    ]
    return groups, ndcg_at_k(ranks[0], K), ndcg_at_k(ranks[1], K)


def covered(draws, users):
    true = float(chances(1.25) @ GAIN - chances(1.0) @ GAIN)
    inside = 0
    for draw in range(draws):
        groups, before, after = simulate(np.random.default_rng(draw), users)
        found = paired_bootstrap(after, before, resamples=2000, seed=draw, groups=groups)
        inside += found["low"] <= true <= found["high"]
    return inside / draws


def p_values(draws, users):
    found = []
    for draw in range(draws):
        groups, before, after = simulate(np.random.default_rng(draw), users, 1.0, 1.0)
        found.append(sign_flip_p(after - before, resamples=2000, seed=draw, groups=groups))
    return np.sort(found)


def distance(values):
    """Kolmogorov's, from uniform; of n draws it is above 1.63 / sqrt(n) once in a hundred times."""
    steps = np.arange(len(values) + 1) / len(values)
    return max((steps[1:] - values).max(), (values - steps[:-1]).max())


def test_a_few():
    assert 0.85 <= covered(60, 200) <= 1 and distance(p_values(60, 200)) < 1.63 / 60**0.5


@pytest.mark.slow
def test_intervals_cover_in_95_percent():
    share = covered(1000, 500)
    print(f"covered: {share:.1%} of 1,000")
    assert 0.93 <= share <= 0.97


@pytest.mark.slow
def test_p_is_uniform_where_there_is_no_difference():
    values = p_values(1000, 500)
    print(f"Kolmogorov distance {distance(values):.3f}; p < .05 in {(values < 0.05).mean():.1%} of 1,000")
    assert distance(values) < 1.63 / 1000**0.5 and 0.035 <= (values < 0.05).mean() <= 0.065


@pytest.mark.slow
def test_intervals_over_seeds_cover():
    """
    Seeds whose means differ by as much as users make them uncertain. What users and seeds do together is counted with
    both, so that the intervals are rather too wide.
    """
    shares = {}
    for seeds in (2, 3, 5, 10):
        inside = 0
        for draw in range(300):
            generator = np.random.default_rng(draw)
            user = generator.normal(size=300)
            sides = [
                user * 0.5 + generator.normal(size=(seeds, 1)) * 0.05 + generator.normal(size=(seeds, 300))
                for _ in range(2)
            ]
            found = paired_bootstrap(sides[1] + 0.1, sides[0], resamples=1000, seed=draw)
            inside += found["low"] <= 0.1 <= found["high"]
        shares[seeds] = inside / 300
    print(f"covered with so many seeds a side: {shares}")
    assert min(shares.values()) >= 0.93


def test_the_sign_flips_are_those_of_the_plain_way():
    """Every one of 2^8 sign patterns of eight users, counted; the drawn share is within its own noise of it."""
    differences = np.random.default_rng(0).normal(0.4, 1, 8)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = (np.abs(differences @ signs) >= abs(differences.sum()) - 1e-9).mean()
    drawn = sign_flip_p(np.repeat(differences / 2, 2), groups=np.repeat(np.arange(8), 2))
    assert drawn == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 10_000) ** 0.5)
