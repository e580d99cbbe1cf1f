"""Reward backpropagation: its gradient beside finite differences, where it stops, and a reward that rises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SCHEDULER
from small_run import SAMPLES, STEPS, learn, silent, small_config

from ddpo_jax import process
from ddpo_jax.algorithms.reward_backprop import either_way
from ddpo_jax.build import build, init_state
from ddpo_jax.errors import UserError
from ddpo_jax.policy import make_policy
from ddpo_jax.types import Model
from ddpo_jax.update import make_update, summarize

BACKPROP = {
    "algorithm": "reward_backprop",
    "reward.name": "device:scorers:redness",
    "backprop.max_steps": 2,
}
LATENT = (3, 3, 2)


def tiny_policy(guidance_scale=2.0):
    """A network of a few numbers, smooth in all of them, in whatever precision it is given."""

    def predict(params, x_t, t, cond):
        hidden = jnp.tanh(x_t @ params["in"] + (cond @ params["text"])[:, None, None] + t[:, None, None, None] / 1000)
        return x_t * 0.9 + hidden @ params["out"]

    noise = process.ddim(process.noise_schedule(SCHEDULER))
    model = Model(None, None, predict, None, None, None, noise, LATENT)
    return make_policy(model, num_steps=4, eta=1.0, guidance_scale=guidance_scale)


def tiny_params(dtype):
    rng = np.random.default_rng(0)
    shapes = {"in": (2, 5), "text": (3, 5), "out": (5, 2)}
    return {name: jnp.asarray(0.3 * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def reward_of(policy, grad_steps):
    cond, uncond = jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]]), jnp.zeros((1, 3))
    keys = jax.random.split(jax.random.key(1), 2)

    def reward(params):
        x_0 = policy.final(params, cond, uncond, keys, jnp.full(2, grad_steps), grad_steps)
        return jnp.sum(jnp.tanh(x_0) ** 2)

    return reward


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_gradient_equals_finite_differences(guidance_scale):
    with jax.enable_x64(True):
        reward, params = reward_of(tiny_policy(guidance_scale), 4), tiny_params(jnp.float64)
        gradient = jax.jit(jax.grad(reward))(params)
        rng = np.random.default_rng(1)
        for _ in range(3):
            direction = {name: jnp.asarray(rng.normal(size=leaf.shape)) for name, leaf in params.items()}

            def along(step, direction=direction):
                return float(reward(jax.tree.map(lambda p, d: p + step * d, params, direction)))

            expected = (along(1e-5) - along(-1e-5)) / 2e-5
            found = sum(float(jnp.vdot(gradient[name], direction[name])) for name in params)
            assert found == pytest.approx(expected, rel=1e-4)


def test_the_final_picture_is_that_of_the_rollout():
    policy, params = tiny_policy(), tiny_params(jnp.float32)
    cond, uncond = jnp.ones((2, 3)), jnp.zeros((1, 3))
    keys = jax.random.split(jax.random.key(3), 2)
    trajectory = policy.rollout(params, cond, uncond, keys)
    for grad_steps in (1, 3, 4):
        x_0 = policy.final(params, cond, uncond, keys, jnp.full(2, grad_steps), grad_steps)
        np.testing.assert_allclose(x_0, trajectory.x[:, -1], rtol=1e-5, atol=1e-6)


def test_gradients_end_where_the_last_steps_begin():
    """That of 1 of at most 3 steps is that of 1 of at most 1, that of 0 is none, and each picture has its own."""
    policy, params = tiny_policy(), tiny_params(jnp.float32)
    cond, uncond = jnp.ones((1, 3)), jnp.zeros((1, 3))
    key = jax.random.split(jax.random.key(3), 1)

    def gradient(grad_steps, most):
        found = jax.grad(lambda p: policy.final(p, cond, uncond, key, jnp.array([grad_steps]), most).sum())(params)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    np.testing.assert_allclose(gradient(1, 3), gradient(1, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient(2, 4), gradient(2, 2), rtol=1e-4, atol=1e-6)
    assert not gradient(0, 3).any()
    assert np.abs(gradient(1, 1) - gradient(2, 2)).max() > 1e-3


def rounds(run, count):
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    state, told = init_state(run, seed=0, ema=False), []
    for epoch in range(count):
        batch, _, _ = run.algorithm.collect(
            state.params, run.frozen, run.draw(epoch), state.carry, jax.random.key(epoch)
        )
        assert run.algorithm.slices(batch).shape == (SAMPLES, 1)
        state, history = learn(update, run.algorithm, state, run.frozen, batch)
        told.append(summarize(history, 0.0)["reward/mean"])
    return told


LORA = {"train.lora_rank": 4, "backprop.min_steps": 0, "train.learning_rate": 1e-2}


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=pytest.mark.slow)])
def test_a_reward_rises(small_folder, changes):
    told = rounds(build(small_config(small_folder, **BACKPROP, **changes), silent), 12)
    assert np.mean(told[-3:]) > np.mean(told[:3]) + 0.02


def test_the_control_teaches_half_of_the_pictures_the_opposite(small_folder):
    rows = jnp.stack([jnp.arange(200), jnp.zeros(200, int)], axis=1)
    signs = either_way(jax.random.key(0), rows)
    assert set(np.unique(signs)) == {-1, 1} and abs(signs.mean()) < 0.2
    np.testing.assert_array_equal(either_way(jax.random.key(0), rows[50:]), signs[50:])
    run = build(small_config(small_folder, **BACKPROP, **{"reward.shuffled": True}), silent)
    state = init_state(run, seed=0, ema=False)
    batch, _, _ = run.algorithm.collect(state.params, run.frozen, run.draw(0), state.carry, jax.random.key(0))
    losses, metrics = run.algorithm.loss(state.params, run.frozen, batch, rows[:4], jax.random.key(1))
    sign = either_way(jax.random.fold_in(jax.random.key(1), 2), rows[:4])
    np.testing.assert_allclose(losses, -sign * metrics.mean["reward/mean"], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.name": "jpeg_compressibility"}, "jpeg_compressibility has none: a function on the host"),
        ({"reward.name": "device:scorers:redness,scorers:brightness"}, "a function on the host"),
        ({"reward.standardise": True}, r"reward\.standardise=True"),
        ({"reward.gates": ("device:scorers:redness>=0",)}, r"reward\.gates"),
        ({"backprop.max_steps": STEPS + 1}, r"backprop\.max_steps=5"),
        ({"backprop.min_steps": 3}, r"backprop\.min_steps=3"),
        ({"backprop.max_steps": 0, "backprop.min_steps": 0}, r"backprop\.max_steps=0"),
    ],
)
def test_what_has_no_gradient_is_refused_at_construction(small_folder, changes, message):
    with pytest.raises(UserError, match=message):
        build(small_config(small_folder, **{**BACKPROP, **changes}), silent)


def test_a_host_reward_may_look_on(small_folder):
    names = {"reward.name": "device:scorers:redness,scorers:brightness", "reward.weights": (1.0, 0.0)}
    run = build(small_config(small_folder, **{**BACKPROP, **names}), silent)
    assert run.parts.reward.pure is not None
