"""Reward-weighted regression: the weights by hand, what is learned from, and a reward that rises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import SAMPLES, learn, silent, small_config

from ddpo_jax import advantages
from ddpo_jax.build import build, init_state
from ddpo_jax.errors import UserError
from ddpo_jax.update import make_update

RWR = {
    "algorithm": "rwr",
    "reward.name": "device:scorers:redness",
    "rwr.temperature": 0.01,
    "sample.guidance_scale": 3.0,
    "train.num_noise_draws": 4,
}


def a_round(run, state, epoch=0):
    return run.algorithm.collect(state.params, run.frozen, run.draw(epoch), state.carry, jax.random.key(epoch))


def test_softmax_weights_by_hand():
    rewards = np.array([1.0, 2.0, np.nan, 1.0], np.float32)
    weight, present, _ = advantages.softmax(temperature=0.5, by_prompt=False).update((), np.zeros(4, int), rewards)
    unnormalised = np.exp(np.array([2.0, 4.0, 2.0]))
    np.testing.assert_allclose(weight[[0, 1, 3]], 3 * unnormalised / unnormalised.sum(), rtol=1e-6)
    assert weight[2] == present[2] == 0 and present.sum() == 3


def test_softmax_by_prompt_compares_a_prompt_with_itself():
    rewards = np.array([1.0, 2.0, 101.0, 102.0], np.float32)
    weight, _, _ = advantages.softmax(temperature=1.0, by_prompt=True).update((), np.array([0, 0, 1, 1]), rewards)
    np.testing.assert_allclose(weight[:2], weight[2:], rtol=1e-5)
    assert weight.sum() == pytest.approx(4)


def test_an_infinite_temperature_weighs_all_alike():
    weight, _, _ = advantages.softmax(temperature=1e30, by_prompt=False).update((), np.zeros(3, int), np.arange(3.0))
    np.testing.assert_allclose(weight, 1)


def test_large_rewards_do_not_overflow():
    weight, _, _ = advantages.softmax(temperature=1.0, by_prompt=False).update(
        (), np.zeros(2, int), np.array([1e30, 0.0], np.float32)
    )
    assert weight.tolist() == [2, 0]


def test_the_top_fraction_is_kept():
    rewards = np.array([3.0, 1.0, np.nan, 5.0, 3.0])
    kept, present, _ = advantages.top_fraction(fraction=0.5, by_prompt=False).update((), np.zeros(5, int), rewards)
    assert kept.tolist() == present.tolist() == [1, 0, 0, 1, 0]  # of the two 3s the first
    kept, _, _ = advantages.top_fraction(fraction=0.1, by_prompt=True).update((), np.array([0, 0, 0, 1, 1]), rewards)
    assert kept.tolist() == [1, 0, 0, 1, 0]


def test_only_the_best_are_learned_from(small_folder):
    run = build(small_config(small_folder, **{**RWR, "algorithm": "sparse_rwr", "rwr.top_fraction": 0.25}), silent)
    batch, _, report = a_round(run, init_state(run, seed=0, ema=False))
    slices = run.algorithm.slices(batch)
    assert slices.shape == (SAMPLES, 4) and slices.any(axis=1).sum() == SAMPLES // 4
    assert report["effective_samples"] == SAMPLES // 4


def test_guidance_1_and_unguided_are_the_same_regression(small_folder):
    losses = []
    for guided in (True, False):
        changes = {**RWR, "rwr.guided": guided, "sample.guidance_scale": 1.0}
        run = build(small_config(small_folder, **changes), silent)
        state = init_state(run, seed=0, ema=False)
        batch, _, _ = a_round(run, state)
        rows = jnp.array([[0, 0], [1, 3]])
        batch = batch._replace(weight=jnp.asarray(batch.weight))
        params = run.frozen.denoiser
        losses.append(run.algorithm.loss(params, run.frozen, batch, rows, jax.random.key(0))[0])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_learnable_reward_rises(small_folder):
    run = build(small_config(small_folder, **RWR), silent)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    state, means = init_state(run, seed=0, ema=False), []
    for epoch in range(6):
        batch, carry, report = a_round(run, state, epoch)
        state, _ = learn(update, run.algorithm, state, run.frozen, batch)
        state = state._replace(carry=carry)
        means.append(report["reward/mean"])
    assert np.mean(means[-2:]) > means[0] + report["reward/std"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rwr.temperature": 0.0}, r"rwr\.temperature=0\.0"),
        ({"algorithm": "sparse_rwr", "rwr.top_fraction": 0.0}, r"rwr\.top_fraction=0\.0"),
        ({"train.num_noise_draws": 0}, r"train\.num_noise_draws=0"),
    ],
)
def test_wrong_settings_are_refused(small_folder, changes, message):
    with pytest.raises(UserError, match=message):
        build(small_config(small_folder, **{**RWR, **changes}), silent)
