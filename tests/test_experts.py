"""Several experts as one reward: sums, the worst of them, gates, running statistics, and what is missing."""

import jax
import numpy as np
import pytest

from ddpo_jax import experts
from ddpo_jax.errors import RunStopped, UserError

NAN = np.nan
NAMES = ("one", "my_module:two", "three")


def make(weights=(1.0, 1.0, 1.0), *, reduction="weighted_sum", standardise=False, gates=()):
    weights = np.array(weights, np.float32)
    return experts.make(NAMES[: len(weights)], weights, reduction=reduction, standardise=standardise, gates=gates)


def rewards_of(combination, scores):
    rewards, _ = combination.update(combination.init(), np.array(scores, np.float32))
    return rewards


SCORES = [[1, 10, NAN], [2, NAN, 5], [NAN, 30, 5], [4, 1, 0]]  # three experts


def test_a_weighted_sum_keeps_what_is_missing():
    np.testing.assert_array_equal(rewards_of(make((2, -0.5, 0)), SCORES), [-3, NAN, NAN, 7.5])


def test_the_minimum_is_of_weighted_scores():
    np.testing.assert_array_equal(rewards_of(make((2, -0.5, 0), reduction="minimum"), SCORES), [-5, NAN, NAN, -0.5])


def test_weights_are_one_an_expert():
    with pytest.raises(UserError, match="one for each of 3"):
        experts.weighted_sum(np.ones((2, 3), np.float32), np.ones(1, np.float32))


def test_a_closed_gate_gives_the_lowest_open_reward_and_a_missing_one_none():
    scores = [[5, 1.0], [3, 0.5], [9, 0.4], [1, 0.0], [4, NAN], [NAN, 1.0]]
    gated = rewards_of(make((1, 0), gates=("my_module:two>=0.5",)), scores)
    np.testing.assert_array_equal(gated, [5, 3, 3, 3, NAN, NAN])


def test_gates_of_all_experts_must_hold_and_none_open_makes_all_alike():
    scores = [[5, 1.0], [3, 0.5], [9, 0.4]]
    both = make((1, 0), gates=("one<=8", "my_module:two >= 4.5e-1"))
    np.testing.assert_array_equal(rewards_of(both, scores), [5, 3, 3])
    np.testing.assert_array_equal(rewards_of(make((1, 0), gates=("one>=10",)), scores), [3, 3, 3])


@pytest.mark.parametrize("gate", ["four>=1", "one>1", "one>=", ">=1", "one>=x", "one>=1.2.3", "one>=."])
def test_a_gate_that_is_none_is_refused(gate):
    with pytest.raises(UserError, match=r"reward\.gates: .*is no gate; expected one of one, my_module:two, three"):
        make(gates=(gate,))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UserError, match=r"reward\.combine='max': expected one of weighted_sum, minimum"):
        make(reduction="max")


def test_running_statistics_are_those_of_all_scores_so_far():
    rng = np.random.default_rng(0)
    rounds = [rng.normal((50, -3, 0), (10, 0.1, 1), (20, 3)).astype(np.float32) for _ in range(3)]
    rounds[1][4, 0] = rounds[2][0, 2] = NAN
    combination = make((1.0, 2.0, 0.5), standardise=True)
    carry = combination.init()
    for i, scores in enumerate(rounds):
        rewards, carry = combination.update(carry, scores)
        seen = np.concatenate(rounds[: i + 1]).astype(np.float64)
        scaled = (scores - np.nanmean(seen, axis=0)) / np.nanstd(seen, axis=0)
        np.testing.assert_allclose(rewards, scaled @ [1.0, 2.0, 0.5], rtol=1e-4, atol=1e-4)
    assert all(leaf.dtype in (np.float32, np.int32) for leaf in jax.tree.leaves(carry))


def test_standardised_experts_count_alike_whatever_their_scales():
    scores = np.random.default_rng(1).normal(size=(64, 2)).astype(np.float32)
    scaled = scores * np.float32([1e3, 1e-3]) + np.float32([7, -7])
    found, expected = (rewards_of(make((1, 1), standardise=True), x) for x in (scaled, scores))
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_an_expert_that_never_varies_does_not_count():
    scores = np.stack([np.arange(4), np.full(4, 7)], axis=1).astype(np.float32)
    np.testing.assert_allclose(
        rewards_of(make((1, 1), standardise=True), scores), rewards_of(make((1, 0), standardise=True), scores)
    )


def test_evaluations_are_measured_by_the_first():
    rng = np.random.default_rng(2)
    before, after = (rng.normal(size=(30, 2)).astype(np.float32) + shift for shift in (0, np.float32([1, 0])))
    combination = make((1, 1), standardise=True)
    scale = experts.scale_of(before)
    told = experts.report(NAMES[:2], before, combination.judge(before, scale))
    again = experts.scale_told(NAMES[:2], [told, {}])  # as a run that goes on reads it
    np.testing.assert_array_equal(np.array(again), np.array(scale))
    assert abs(told["reward/mean"]) < 1e-6
    gained = combination.judge(after, again).mean() - combination.judge(before, again).mean()
    shift = (after.mean(axis=0) - before.mean(axis=0)) / before.std(axis=0)
    np.testing.assert_allclose(gained, shift.sum(), rtol=1e-4)
    unscaled = make((1, 1))
    np.testing.assert_array_equal(unscaled.judge(after, scale), rewards_of(unscaled, after))


def test_an_expert_is_measured_by_the_first_evaluation_that_knows_it():
    rows = [{"reward/one": 5.0, "reward/one/std": 0.0, "reward/my_module:two": None}]
    rows += [{"reward/one": 7.0, "reward/one/std": 2.0, "reward/my_module:two": 1.0, "reward/my_module:two/std": 4.0}]
    scale = experts.scale_told(NAMES[:2], rows)
    np.testing.assert_array_equal(np.array(scale), [[5, 1], [0, 4]])
    combination = make((1, 1), standardise=True)
    np.testing.assert_allclose(combination.judge(np.array([[8, 5]], np.float32), scale), [3 + 1])  # not divided by 0
    nothing = experts.scale_told(NAMES[:2], [])
    np.testing.assert_array_equal(np.array(experts.first_known(nothing, scale)), np.array(scale))


def test_check_missing_counts_the_whole_batch_before_it_is_there():
    scores = np.full((4, 1), NAN, np.float32)
    check = {"max_missing": 0.25, "names": ("one",)}
    experts.check_missing(scores[:, 0], scores, **check, count=16)
    with pytest.raises(RunStopped, match=r"4 of 12 rewards are missing \(33.3%"):
        experts.check_missing(scores[:, 0], scores, **check, count=12)


def test_check_missing_stops_above_the_fraction_only():
    scores = np.array([[1, 1], [NAN, 1], [NAN, NAN], [1, NAN]], np.float32)
    check = {"max_missing": 0.5, "names": ("jpeg", "mine")}
    experts.check_missing(scores[:, 0], scores, **check)
    rewards = scores.sum(axis=1)
    with pytest.raises(RunStopped, match=r"3 of 4 rewards .*75.0%.*reward\.max_missing.*50.0%.*jpeg 2, mine 2"):
        experts.check_missing(rewards, scores, **check)
    with pytest.raises(RunStopped, match=r"The last: mine: the reply was 'dunno'"):
        experts.check_missing(rewards, scores, **check, why="mine: the reply was 'dunno'")


def test_the_report_tells_of_each_expert():
    told = experts.report(("a", "b"), np.array([[1, NAN], [3, NAN]], np.float32), np.array([2, NAN], np.float32))
    assert told["reward/mean"] == 2 and told["reward/missing"] == 1
    assert (told["reward/a"], told["reward/a/std"]) == (2, 1) and np.isnan(told["reward/b"])
