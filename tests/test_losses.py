"""Losses, by hand and by what they must have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from ddpo_jax import losses, process
from ddpo_jax.errors import UserError
from ddpo_jax.types import Gaussian

SHAPE = (2, 3, 4, 2)


def rows(*values):
    return jnp.array(values, jnp.float32)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def gradient(loss, log_prob):
    return jax.grad(lambda log_prob: jnp.sum(loss(log_prob)))(log_prob)


def test_ppo_clip_worked():
    """ε = 0.1; ratios 1.2, 1.2, 0.8, 0.8, 1.05; a row is clipped where going on would be rewarded."""
    log_prob, advantage = jnp.log(rows(1.2, 1.2, 0.8, 0.8, 1.05)), rows(2, -2, 2, -2, 2)

    def loss(log_prob):
        return losses.ppo_clip(log_prob, jnp.zeros(5), advantage, clip_range=0.1)[0]

    np.testing.assert_allclose(loss(log_prob), [-2 * 1.1, 2 * 1.2, -2 * 0.8, 2 * 0.9, -2 * 1.05], rtol=1e-6)
    np.testing.assert_allclose(gradient(loss, log_prob), [0, 2 * 1.2, -2 * 0.8, 0, -2 * 1.05], rtol=1e-6)


def test_policy_metrics_worked():
    _, metrics = losses.ppo_clip(jnp.log(rows(1.2, 0.8, 1.05, 1)), jnp.zeros(4), rows(1, 1, 1, 1), clip_range=0.1)
    np.testing.assert_allclose(metrics.mean["ratio"], [1.2, 0.8, 1.05, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics.mean["clip_fraction"], [1, 1, 0, 0])
    np.testing.assert_allclose(metrics.mean["approx_kl"], 0.5 * np.log([1.2, 0.8, 1.05, 1]) ** 2, rtol=1e-5)
    np.testing.assert_allclose(metrics.max["ratio_max_deviation"], [0.2, 0.2, 0.05, 0], rtol=1e-5)


def test_the_published_clip_range_is_resolved_in_float32():
    log_prob = jnp.log1p(rows(0.9e-4, 1.1e-4, -0.9e-4, -1.1e-4))
    _, metrics = losses.ppo_clip(log_prob, jnp.zeros(4), jnp.ones(4), clip_range=1e-4)
    assert metrics.mean["clip_fraction"].tolist() == [0, 1, 0, 1]


def test_score_function_and_importance_sampling_agree_on_policy():
    """Through a transition: at ratio 1 the two losses have one gradient in the network's output."""
    noise_process = process.ddim(process.noise_schedule({}))
    t, t_next, advantage = rows(900, 100), rows(880, 80), rows(0.7, -1.9)
    x_t, prediction = normal(0), normal(1)

    def log_prob(prediction):
        return process.log_prob(noise_process.transition(prediction, x_t, t, t_next, eta=1.0), x_next, reduce="mean")

    x_next = process.sample(noise_process.transition(prediction, x_t, t, t_next, eta=1.0), normal(2))
    old = log_prob(prediction)
    by_ratio = jax.grad(lambda p: jnp.sum(losses.ppo_clip(log_prob(p), old, advantage, clip_range=1e-4)[0]))(prediction)
    by_score = jax.grad(lambda p: jnp.sum(losses.score_function(log_prob(p), old, advantage)[0]))(prediction)
    assert np.all(np.abs(by_ratio) > 0)
    np.testing.assert_allclose(by_ratio, by_score, rtol=1e-6)


def test_the_score_function_logs_what_ppo_logs():
    args = rows(-1.0, -1.1), rows(-1.0, -1.0), rows(1, 2)
    loss, metrics = losses.score_function(*args)
    _, ppo_metrics = losses.ppo_clip(*args, clip_range=0.01)
    np.testing.assert_allclose(loss, [1, 2.2], rtol=1e-6)
    assert metrics.mean.keys() == ppo_metrics.mean.keys()
    assert metrics.max.keys() == ppo_metrics.max.keys()
    assert metrics.mean["clip_fraction"].tolist() == [0, 0]
    np.testing.assert_array_equal(metrics.mean["ratio"], ppo_metrics.mean["ratio"])


def test_kl_is_that_of_normals():
    """By quadrature of the definition, element by element."""
    p, q = normal(0, (2, 1, 2, 1)), normal(1, (2, 1, 2, 1))
    std = rows(0.5, 1.5)[:, None, None, None]

    def elementwise(mean_p, mean_q, sigma):
        density_p, density_q = scipy.stats.norm(mean_p, sigma), scipy.stats.norm(mean_q, sigma)
        grid = np.linspace(mean_p - 10 * sigma, mean_p + 10 * sigma, 2001)
        integrand = density_p.pdf(grid) * (density_p.logpdf(grid) - density_q.logpdf(grid))
        return scipy.integrate.simpson(integrand, x=grid)

    kl = np.vectorize(elementwise)(np.float64(p), np.float64(q), np.float64(std))
    for reduce, total in [("mean", np.mean), ("sum", np.sum)]:
        actual = losses.gaussian_kl(Gaussian(p, std), Gaussian(q, std), reduce=reduce)
        np.testing.assert_allclose(actual, total(kl, axis=(1, 2, 3)), rtol=1e-5)


def test_kl_is_the_mean_difference_of_log_probs():
    """On the same scale as log_prob of the same `reduce`: E_p[log p - log q] over many draws from p."""
    shape, std = (4, 64, 64, 4), jnp.full((4, 1, 1, 1), 0.3)
    p, q = Gaussian(normal(0, shape), std), Gaussian(normal(0, shape) + 0.2, std)
    x = process.sample(p, normal(1, shape))
    difference = process.log_prob(p, x, reduce="mean") - process.log_prob(q, x, reduce="mean")
    np.testing.assert_allclose(losses.gaussian_kl(p, q, reduce="mean"), (0.2 / 0.3) ** 2 / 2, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(difference), (0.2 / 0.3) ** 2 / 2, rtol=0.02)


def test_kl_of_a_deterministic_transition_is_0_with_finite_gradients():
    std = rows(0, 0.5)[:, None, None, None]

    def kl(mean_p, mean_q):
        return losses.gaussian_kl(Gaussian(mean_p, std), Gaussian(mean_q, std), reduce="mean")

    means = normal(0), normal(1)
    assert kl(*means)[0] == 0
    assert kl(*means)[1] > 0
    for grad in jax.grad(lambda *means: jnp.sum(kl(*means)), (0, 1))(*means):
        assert np.all(np.isfinite(grad))
        assert not np.any(grad[0])
        assert np.all(grad[1])


def test_kl_of_an_unknown_reduction():
    p = Gaussian(normal(0), jnp.ones((2, 1, 1, 1)))
    with pytest.raises(UserError, match="reduce 'max' is unknown"):
        losses.gaussian_kl(p, p, reduce="max")


def test_denoising_mse_is_a_mean_in_float32():
    prediction = jnp.full((2, 2, 2, 2), 1.5, jnp.bfloat16)
    target = jnp.stack([jnp.full((2, 2, 2), 1.0), jnp.full((2, 2, 2), 3.5)])
    error = losses.denoising_mse(prediction, target)
    assert error.dtype == jnp.float32
    np.testing.assert_allclose(error, [0.25, 4.0])


def test_weighted_mse():
    loss, metrics = losses.weighted_mse(rows(0.25, 4), rows(2, 0))
    assert loss.tolist() == [0.5, 0]
    assert metrics.mean["denoising_mse"].tolist() == [0.25, 4]
    assert metrics.mean["weight"].tolist() == [2, 0]
    assert metrics.max == {}


def test_bradley_terry_worked():
    """σ(log 3) = 3/4: a preferred, a rejected, a half sure one, and equal scores."""
    score_0, label = rows(np.log(3), np.log(3), np.log(3), 1), rows(1, 0, 0.75, 0.9)
    loss, metrics = losses.bradley_terry(score_0, rows(0, 0, 0, 1), label)
    entropy = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    np.testing.assert_allclose(loss, [np.log(4 / 3), np.log(4), entropy, np.log(2)], rtol=1e-6)
    assert metrics.mean["agreement"].tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(metrics.mean["margin"], [np.log(3)] * 3 + [0], rtol=1e-6)


def test_bradley_terry_is_least_where_the_odds_are_the_labels():
    label = rows(0.2, 0.5, 0.9)
    log_odds = jnp.log(label / (1 - label))
    slope = jax.grad(lambda scores: losses.bradley_terry(scores, jnp.zeros(3), label)[0].sum())
    np.testing.assert_allclose(slope(log_odds), [0, 0, 0], atol=1e-7)
    assert (slope(log_odds + 0.1) > 0).all() and (slope(log_odds - 0.1) < 0).all()


def test_bradley_terry_knows_no_first_and_second():
    a, b, label = normal(0, (8,)), normal(1, (8,)), rows(*np.linspace(0, 1, 8))
    np.testing.assert_allclose(
        losses.bradley_terry(a, b, label)[0], losses.bradley_terry(b, a, 1 - label)[0], rtol=1e-6
    )
    assert jnp.isfinite(losses.bradley_terry(1e4 * a, 1e4 * b, label)[0]).all()
