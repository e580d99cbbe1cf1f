"""Intervals against what they promise, on simulated rewards; what can be counted by hand."""

import numpy as np
import pytest

from ddpo_jax import statistics
from ddpo_jax.statistics import Estimate, compare, compare_diversity, diversity, mean

CERTAIN = Estimate(0.0, 0.0, 0.0)


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)


@pytest.mark.parametrize("per_prompt", [1, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(fewer, per_prompt):
    """Rewards with an effect of the prompt: the pictures of one are alike. 300 experiments of 40 prompts."""
    rng, cluster = np.random.default_rng(1), np.repeat(np.arange(40), per_prompt)
    hits = np.zeros(3)
    for _ in range(300):
        gain = (0.3 + rng.normal(size=40))[cluster] + 0.3 * rng.normal(size=40 * per_prompt)
        b = rng.normal(size=40)[cluster]
        found = compare(b + gain, b, cluster)
        own = mean(gain, cluster)
        # the truths: 0.3, and P(N(0.3, 1 + 0.09) > 0) = Φ(0.2873)
        hits += [
            own.low < 0.3 < own.high,
            found.difference.low < 0.3 < found.difference.high,
            found.win_rate.low <= 0.6131 <= found.win_rate.high,
        ]
    assert (hits / 300 > 0.9).all() and (hits / 300 < 0.98).all()


def test_pictures_of_one_prompt_are_not_taken_for_new_evidence():
    """Each picture five times: the same interval. As if they were prompts of their own: a narrower one."""
    values = np.random.default_rng(0).normal(size=30)
    once, five = mean(values, np.arange(30)), mean(np.repeat(values, 5), np.repeat(np.arange(30), 5))
    np.testing.assert_allclose(five, once, rtol=1e-12)
    alone = mean(np.repeat(values, 5), np.arange(150))
    assert alone.high - alone.low < 0.6 * (once.high - once.low)


def test_the_interval_is_the_normal_one_of_many():
    values = np.random.default_rng(0).normal(size=900)
    found = mean(values, np.arange(900))
    half = 1.96 * values.std() / 30
    np.testing.assert_allclose(found, [values.mean(), values.mean() - half, values.mean() + half], atol=0.006)
    assert found == mean(values, np.arange(900))


def test_a_win_rate_by_hand():
    a, b = np.array([1.0, 2, 3, 4, np.nan, 6]), np.array([0.0, 2, 4, 2, 5, np.inf])
    found = compare(a, b, np.arange(6))
    assert (found.count, found.missing) == (4, 2)
    assert found.win_rate.value == 2.5 / 4 and found.difference.value == 0.5
    np.testing.assert_allclose(np.array(found.sigmas) * b[:4].std(), found.difference)
    other = compare(b, a, np.arange(6))
    np.testing.assert_allclose(other.win_rate, [1 - x for x in (2.5 / 4, found.win_rate.high, found.win_rate.low)])


def test_a_model_against_itself_is_neither_better_nor_worse():
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    found = compare(values, values, np.arange(50) // 5)
    assert found.difference == found.sigmas == CERTAIN and found.win_rate == Estimate(0.5, 0.5, 0.5)


def test_winning_every_time_is_not_certainty():
    """Of 8 wins in 8 prompts the exact 95 % bound is 0.6306."""
    values, cluster = np.random.default_rng(0).normal(size=16), np.repeat(np.arange(8), 2)
    won, lost = compare(values + 1, values, cluster), compare(values - 1, values, cluster)
    np.testing.assert_allclose(won.win_rate, [1, 0.6306, 1], atol=1e-4)
    np.testing.assert_allclose(lost.win_rate, [0, 0, 0.3694], atol=1e-4)


def test_too_little_to_tell():
    one = compare(np.array([2.0]), np.array([1.0]), np.array([0]))
    assert one.difference.value == 1 and np.isnan([one.difference.low, one.difference.high, *one.sigmas]).all()
    none = compare(np.array([np.nan]), np.array([1.0]), np.array([0]))
    assert (none.count, none.missing) == (0, 1) and np.isnan(none.difference + none.win_rate).all()
    assert np.isnan(mean(np.zeros(0), np.zeros(0, int))).all()
    # of a single prompt its pictures are drawn anew
    several = mean(np.arange(10.0), np.zeros(10, int))
    assert several.low < 4.5 < several.high


def features_of(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_diversity_is_the_mean_over_all_pairs():
    rng, cluster = np.random.default_rng(0), np.array([0, 0, 0, 1, 1, 2])
    features = features_of(rng.normal(size=(6, 4)))
    distance = 1 - features @ features.T
    pairs = [(i, j) for i in range(6) for j in range(i)]
    found = diversity(features, cluster)
    np.testing.assert_allclose(found.overall.value, np.mean([distance[pair] for pair in pairs]))
    within = [np.mean([distance[0, 1], distance[0, 2], distance[1, 2]]), distance[3, 4]]
    np.testing.assert_allclose(found.within.value, np.mean(within))
    same = compare_diversity(features, features, cluster)
    assert same.overall == same.within == CERTAIN
    assert np.isnan(diversity(features, np.arange(6)).within).all()
    assert np.isnan(diversity(features[:1], cluster[:1]).overall).all()


def test_the_interval_of_a_diversity_covers_it(fewer):
    """Directions around one axis; the truth is 1 - |E[feature]|², from many of them."""
    rng = np.random.default_rng(0)

    def draw(count, spread=1.0):
        return features_of(np.array([1.0, 0, 0]) + spread * rng.normal(size=(count, 3)))

    truth = 1 - (draw(10**6).mean(axis=0) ** 2).sum()
    estimates = [diversity(draw(60), np.arange(60)).overall for _ in range(300)]
    assert 0.9 < np.mean([one.low < truth < one.high for one in estimates]) < 0.98
    collapsed = compare_diversity(draw(60, spread=0.2), draw(60), np.arange(60))
    assert collapsed.overall.high < 0
