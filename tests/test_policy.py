"""The policy on networks of one line: whatever they predict, its samples, densities and guidance must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.finetune import full
from ddpo_jax.policy import make_policy, make_sampler, sample_keys
from ddpo_jax.sharding import one_device
from ddpo_jax.types import Frozen, Gaussian, Model, Posterior

SHAPE = (4, 4, 2)
NUM_STEPS = 5
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PARAMS = {"gain": jnp.float32(0.3)}


def linear(params, x_t, t, cond):
    """A network in which every input counts, and no sample sees another."""
    return params["gain"] * x_t + cond["bias"] + 1e-4 * t[:, None, None, None]


def encode_text(params, tokens):
    return {"bias": (params * tokens.sum(1))[:, None, None, None]}


def make_model(predict=linear, **schedule):
    return Model(
        encode_text=encode_text,
        encode_empty=encode_text,
        predict=predict,
        encode=lambda params, images: Posterior(images, jnp.zeros_like(images)),
        sample_latent=lambda posterior, keys: posterior.mean,
        decode=lambda params, x_0: jax.nn.sigmoid(params * jnp.concatenate([x_0, x_0[..., :1]], axis=-1)),
        process=process.ddim(process.noise_schedule({**SCHEDULE, **schedule})),
        latent_shape=SHAPE,
    )


def policy_of(model, *, num_steps=NUM_STEPS, eta=1.0, guidance_scale=1.0, **settings):
    return make_policy(model, num_steps=num_steps, eta=eta, guidance_scale=guidance_scale, **settings)


def conditions(count, scale=0.1):
    return {"bias": scale * jnp.arange(1.0, count + 1)[:, None, None, None]}


ONE = one_device()
UNCOND = {"bias": jnp.full((1, 1, 1, 1), -0.2)}


def rollout(policy, count=3, *, key=0, params=PARAMS, cond=None):
    keys = sample_keys(jax.random.key(key), np.arange(count))
    return jax.jit(policy.rollout)(params, conditions(count) if cond is None else cond, UNCOND, keys)


def replay(policy, trajectory, cond):
    """The transitions of a trajectory as the update sees them: timesteps folded into the batch; (b T, ...) arrays."""
    _, states = trajectory.t.shape
    x_t, x_next = (trajectory.x[:, cut].reshape(-1, *SHAPE) for cut in (slice(0, -1), slice(1, None)))
    t, t_next = (trajectory.t[:, cut].reshape(-1) for cut in (slice(0, -1), slice(1, None)))
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, states - 1, axis=0), cond)
    return jax.jit(policy.transition)(PARAMS, x_t, t, t_next, rows, UNCOND), x_next


# Samples


def test_a_sample_is_the_same_in_any_chunk():
    policy, cond = policy_of(make_model(), guidance_scale=3.0), conditions(6)
    key, rollout = jax.random.key(7), jax.jit(policy.rollout)
    whole = rollout(PARAMS, cond, UNCOND, sample_keys(key, np.arange(6)))
    for first, count in ((0, 3), (3, 3)):
        part = jax.tree.map(lambda leaf, first=first, count=count: leaf[first : first + count], cond)
        chunk = rollout(PARAMS, part, UNCOND, sample_keys(key, np.arange(first, first + count)))
        for name, found, expected in zip(whole._fields, chunk, whole, strict=True):
            expected = expected[first : first + count]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
            assert found.dtype == expected.dtype


def test_sample_keys_are_distinct_and_functions_of_the_index():
    key = jax.random.key(0)
    whole = jax.random.key_data(sample_keys(key, np.arange(8)))
    assert len(np.unique(whole, axis=0)) == 8
    np.testing.assert_array_equal(jax.random.key_data(sample_keys(key, np.arange(5, 5 + 3))), whole[5:])


def test_a_group_starts_from_the_same_noise_and_parts_at_the_first_step():
    key, policy = jax.random.key(3), policy_of(make_model())
    cond = {"bias": jnp.full((6, 1, 1, 1), 0.1)}
    keys, start_keys = sample_keys(key, np.arange(6)), sample_keys(key, np.arange(6), group_size=3)
    trajectory = jax.jit(policy.rollout)(PARAMS, cond, UNCOND, keys, start_keys)
    alone = jax.jit(policy.rollout)(PARAMS, cond, UNCOND, keys)
    start = np.asarray(trajectory.x[:, 0])
    np.testing.assert_array_equal(start[[1, 2, 4, 5]], start[[0, 0, 3, 3]])
    assert not np.array_equal(start[0], start[3])
    assert len(np.unique(trajectory.x[:, 1], axis=0)) == 6
    for first in (0, 3):  # the first of a group is as without groups
        np.testing.assert_array_equal(trajectory.x[first], alone.x[first])
    np.testing.assert_array_equal(  # a chunk that begins within a group
        jax.random.key_data(sample_keys(key, np.arange(2, 2 + 4), group_size=3)), jax.random.key_data(start_keys)[2:]
    )


def test_noise_is_standard_normal_and_drawn_anew_for_each_step():
    """z of the first state and of every step, recovered from the trajectory: as many independent normal draws."""
    policy, cond = policy_of(make_model()), conditions(400, 1e-3)
    trajectory = rollout(policy, 400, cond=cond)
    step, x_next = replay(policy, trajectory, cond)
    z = ((x_next - step.mean) / step.std).reshape(400, NUM_STEPS, -1)
    z = np.concatenate([np.reshape(trajectory.x[:, 0], (400, 1, -1)), z], axis=1)
    draws = z.size / (NUM_STEPS + 1)
    np.testing.assert_allclose(z.mean((0, 2)), 0, atol=5 / np.sqrt(draws))
    correlation = np.einsum("bik,bjk->ij", z, z) / draws
    np.testing.assert_allclose(correlation, np.eye(NUM_STEPS + 1), atol=8 / np.sqrt(draws))


def test_trajectory_walks_the_process_timesteps():
    model = make_model()
    trajectory = rollout(policy_of(model))
    assert trajectory.x.shape == (3, NUM_STEPS + 1, *SHAPE)
    assert trajectory.log_prob.shape == trajectory.trained.shape == (3, NUM_STEPS)
    np.testing.assert_array_equal(trajectory.t, np.tile(model.process.timesteps(NUM_STEPS), (3, 1)))


def test_eta_0_draws_nothing_after_the_first_state():
    policy, cond = policy_of(make_model(), eta=0.0), conditions(3)
    trajectory = rollout(policy, 3)
    step, x_next = replay(policy, trajectory, cond)
    np.testing.assert_array_equal(step.std, 0)
    np.testing.assert_allclose(x_next, step.mean, rtol=1e-5, atol=1e-6)
    assert not np.any(trajectory.trained) and not np.any(trajectory.log_prob)


@pytest.mark.parametrize(("eta", "prediction_type"), [(0.0, "epsilon"), (1.0, "epsilon"), (0.5, "v_prediction")])
def test_a_network_that_knows_the_picture_draws_it(eta, prediction_type):
    """Where all data are one picture the best network is known in closed form: it has no error, and samples it."""
    schedule = process.noise_schedule({**SCHEDULE, "set_alpha_to_one": True, "prediction_type": prediction_type})
    alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)

    def knows(params, x_t, t, cond):
        a = alpha_bar[t.astype(jnp.int32)][:, None, None, None]
        eps = (x_t - jnp.sqrt(a) * cond) / jnp.sqrt(1 - a)
        return eps if prediction_type == "epsilon" else jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * cond

    model = make_model(knows, set_alpha_to_one=True, prediction_type=prediction_type)
    policy, picture = policy_of(model, eta=eta), jax.random.normal(jax.random.key(1), (64, *SHAPE))
    keys = sample_keys(jax.random.key(2), np.arange(64))
    error = jax.jit(policy.denoising_error)(PARAMS, picture, picture, keys)
    np.testing.assert_allclose(error, 0, atol=1e-6)
    trajectory = jax.jit(policy.rollout)(PARAMS, picture, jnp.zeros((1, *SHAPE)), keys)
    np.testing.assert_allclose(trajectory.x[:, -1], picture, atol=1e-3)


# Densities


@pytest.mark.parametrize(
    ("eta", "guidance_scale", "reduction"), [(1.0, 1.0, "mean"), (1.0, 5.0, "mean"), (0.3, 5.0, "sum")]
)
def test_log_prob_of_the_rollout_is_that_of_its_transitions(eta, guidance_scale, reduction):
    policy = policy_of(make_model(), eta=eta, guidance_scale=guidance_scale, log_prob_reduction=reduction)
    cond = conditions(3)
    trajectory = rollout(policy, 3)
    again = policy.log_prob(*replay(policy, trajectory, cond)).reshape(3, NUM_STEPS)
    assert np.all(trajectory.trained)
    deviation = np.abs(np.expm1(again - trajectory.log_prob)).max()
    assert deviation <= (5e-6 if reduction == "mean" else 5e-6 * np.prod(SHAPE))


def test_sum_is_the_mean_times_the_number_of_elements():
    mean, total = (policy_of(make_model(), log_prob_reduction=name) for name in ("mean", "sum"))
    cond, size = conditions(3), np.prod(SHAPE)
    step, x_next = replay(mean, rollout(mean), cond)
    other = step._replace(mean=step.mean + 0.5 * step.std)
    np.testing.assert_allclose(total.log_prob(step, x_next), size * mean.log_prob(step, x_next), rtol=1e-5)
    np.testing.assert_allclose(total.kl(step, other), size * mean.kl(step, other), rtol=1e-5)
    np.testing.assert_allclose(mean.kl(step, other), 0.125, rtol=1e-3)  # half a standard deviation: ½ · ½²
    np.testing.assert_array_equal(mean.kl(step, step), 0)


def test_kl_is_the_expected_log_ratio():
    policy, rng = policy_of(make_model()), np.random.default_rng(0)
    mean, z = (jnp.asarray(rng.normal(size=(4000, *SHAPE)), jnp.float32) for _ in range(2))
    p = Gaussian(mean, jnp.asarray(rng.uniform(0.1, 2, size=(4000, 1, 1, 1)), jnp.float32))
    x, q = p.mean + p.std * z, p._replace(mean=p.mean + 0.3 * p.std)
    ratio = policy.log_prob(p, x) - policy.log_prob(q, x)
    assert np.mean(ratio) == pytest.approx(float(np.mean(policy.kl(p, q))), rel=0.05)


def test_a_last_step_to_the_clean_end_is_not_trained_on_and_leaves_no_nan():
    policy = policy_of(make_model(set_alpha_to_one=True))
    trajectory = rollout(policy, 3)
    np.testing.assert_array_equal(trajectory.trained, [[True] * (NUM_STEPS - 1) + [False]] * 3)
    np.testing.assert_array_equal(trajectory.log_prob[:, -1], 0)

    def loss(params):
        step = policy.transition(
            params, trajectory.x[:, -2], trajectory.t[:, -2], trajectory.t[:, -1], conditions(3), UNCOND
        )
        return policy.log_prob(step, trajectory.x[:, -1]).sum()

    assert jax.jit(jax.grad(loss))(PARAMS)["gain"] == 0


# Guidance


def test_guidance_of_1_calls_the_network_once_a_sample_and_never_reads_the_empty_prompt():
    sizes = []

    def counted(params, x_t, t, cond):
        sizes.append((len(x_t), len(t), len(cond["bias"])))
        return linear(params, x_t, t, cond)

    model, x_t, t = make_model(counted), jax.random.normal(jax.random.key(3), (3, *SHAPE)), jnp.full(3, 401.0)
    nowhere = {"bias": jnp.full((1, 1, 1, 1), jnp.nan)}
    step = policy_of(model).transition(PARAMS, x_t, t, t - 200, conditions(3), nowhere)
    assert sizes == [(3, 3, 3)] and np.all(np.isfinite(step.mean))
    policy_of(model, guidance_scale=2.0).transition(PARAMS, x_t, t, t - 200, conditions(3), UNCOND)
    assert sizes[1:] == [(6, 6, 6)]


def test_guidance_changes_nothing_where_the_prompt_is_the_empty_one():
    plain, guided = (guided_mean(PARAMS, scale, UNCOND["bias"]) for scale in (1.0, 7.5))
    np.testing.assert_allclose(guided, plain, rtol=1e-5, atol=1e-6)


def product(params, x_t, t, cond):
    return params["gain"] * cond["bias"] * x_t


def guided_mean(params, guidance_scale, bias=None):
    """The mean of one step from the same x_t."""
    cond = conditions(2) if bias is None else {"bias": jnp.broadcast_to(bias, (2, 1, 1, 1))}
    policy = policy_of(make_model(product), eta=0.5, guidance_scale=guidance_scale)
    x_t = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    t = jnp.full(2, 401.0)
    return jax.jit(policy.transition)(params, x_t, t, t - 200, cond, UNCOND).mean


def test_guidance_goes_in_a_straight_line_from_the_empty_prompt_through_the_prompt():
    at_0 = guided_mean(PARAMS, 1.0, UNCOND["bias"])
    at_1, at_2, at_5 = (guided_mean(PARAMS, scale) for scale in (1.0, 2.0, 5.0))
    assert np.abs(at_1 - at_0).max() > 0.01
    np.testing.assert_allclose(at_2 - at_0, 2 * (at_1 - at_0), atol=1e-5)
    np.testing.assert_allclose(at_5 - at_0, 5 * (at_1 - at_0), atol=1e-5)


def test_the_gradient_flows_through_both_branches():
    """The network is linear in its parameter, so the derivative is a difference quotient; a detached branch is not."""
    tangent = jax.jvp(lambda gain: guided_mean({"gain": gain}, 5.0), (PARAMS["gain"],), (jnp.float32(1.0),))[1]
    quotient = guided_mean({"gain": jnp.float32(1.0)}, 5.0) - guided_mean({"gain": jnp.float32(0.0)}, 5.0)
    np.testing.assert_allclose(tangent, quotient, atol=1e-5)


# Denoising error


def test_denoising_error_of_a_network_that_predicts_0_is_the_variance_of_the_noise():
    policy = policy_of(make_model(lambda params, x_t, t, cond: jnp.zeros_like(x_t)), guidance_scale=5.0)
    keys = sample_keys(jax.random.key(0), np.arange(2000))
    error = jax.jit(policy.denoising_error)(PARAMS, jnp.ones((2000, *SHAPE)), conditions(2000), keys)
    assert error.shape == (2000,)
    assert np.mean(error) == pytest.approx(1.0, abs=5 * np.sqrt(2 / error.size / np.prod(SHAPE)))


def test_denoising_error_of_a_sample_depends_on_its_own_key_alone():
    policy, keys = policy_of(make_model()), sample_keys(jax.random.key(0), np.arange(6))
    x_0, cond = jax.random.normal(jax.random.key(1), (6, *SHAPE)), conditions(6)
    error = jax.jit(policy.denoising_error)
    whole = error(PARAMS, x_0, cond, keys)
    part = error(PARAMS, x_0[2:4], jax.tree.map(lambda leaf: leaf[2:4], cond), keys[2:4])
    np.testing.assert_allclose(part, whole[2:4], rtol=1e-5)
    same, nothing = jnp.zeros((6, *SHAPE)), conditions(6, 0.0)
    assert len(np.unique(error(PARAMS, same, nothing, keys))) == 6
    assert len(np.unique(error(PARAMS, same, nothing, keys[jnp.zeros(6, int)]))) == 1


def test_timesteps_of_the_denoising_error_cover_the_whole_range():
    seen = policy_of(make_model(lambda params, x_t, t, cond: jnp.zeros_like(x_t) + t[:, None, None, None] / 1000))
    keys = sample_keys(jax.random.key(0), np.arange(4000))
    error = jax.jit(seen.denoising_error)(PARAMS, jnp.zeros((4000, *SHAPE)), conditions(4000), keys)
    # E (t/1000 - eps)² = 1/3 + 1 for t uniform, independent of eps
    assert np.mean(error) == pytest.approx(4 / 3, abs=0.03)


# The sampler, and what is refused


def test_sampler_encodes_rolls_out_and_decodes():
    model = make_model()
    policy = policy_of(model, guidance_scale=2.0)
    frozen = Frozen(text=jnp.float32(0.01), denoiser=None, vae=jnp.float32(2.0), uncond=UNCOND, reward=None)
    tokens, keys = jnp.arange(9).reshape(3, 3), sample_keys(jax.random.key(0), np.arange(3))
    cond, trajectory, images = make_sampler(model, policy, full().merge, layout=ONE)(PARAMS, frozen, tokens, keys)
    np.testing.assert_allclose(cond["bias"][:, 0, 0, 0], [0.03, 0.12, 0.21], rtol=1e-6)
    np.testing.assert_allclose(
        trajectory.x, jax.jit(policy.rollout)(PARAMS, cond, UNCOND, keys).x, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(images, model.decode(frozen.vae, trajectory.x[:, -1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_decoding_in_chunks_draws_the_same_pictures(size):
    model = make_model()
    policy = policy_of(model)
    frozen = Frozen(text=jnp.float32(0.01), denoiser=None, vae=jnp.float32(2.0), uncond=UNCOND, reward=None)
    tokens, keys = jnp.arange(15).reshape(5, 3), sample_keys(jax.random.key(0), np.arange(5))
    whole, chunked = (
        make_sampler(model, policy, full().merge, layout=ONE, decode_chunk_size=count)(PARAMS, frozen, tokens, keys)[2]
        for count in (0, size)
    )
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -0.1}, r"sample\.eta=-0\.1"),
        ({"eta": 1.5}, r"sample\.eta=1\.5"),
        ({"eta": float("nan")}, r"sample\.eta=nan"),
        ({"guidance_scale": 0.5}, r"sample\.guidance_scale=0\.5"),
        ({"guidance_scale": float("nan")}, r"sample\.guidance_scale=nan"),
        ({"log_prob_reduction": "max"}, r"sample\.log_prob_reduction='max'"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"num_steps": 1001}, "num_steps 1001"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(settings, message):
    with pytest.raises(UserError, match=message):
        policy_of(make_model(), **settings)


# A window of noisy steps

WINDOW = np.array([False, True, True, False, False])


def windowed(policy, noisy=WINDOW, count=3, key=0):
    keys = sample_keys(jax.random.key(key), np.arange(count))
    return jax.jit(policy.rollout)(PARAMS, conditions(count), UNCOND, keys, None, jnp.asarray(noisy))


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_a_window_of_all_steps_draws_as_no_window_does(eta):
    policy = policy_of(make_model(), eta=eta)
    for found, expected in zip(windowed(policy, np.ones(NUM_STEPS, bool)), rollout(policy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_steps_outside_of_the_window_are_deterministic_and_not_trained():
    policy, still = (policy_of(make_model(), eta=eta) for eta in (1.0, 0.0))
    trajectory = windowed(policy)
    np.testing.assert_array_equal(trajectory.trained, np.tile(WINDOW, (3, 1)))
    np.testing.assert_array_equal(trajectory.log_prob[:, ~WINDOW], 0)
    step, x_next = replay(still, trajectory, conditions(3))
    drawn = np.abs(x_next - step.mean).reshape(3, NUM_STEPS, -1).max(axis=2)
    assert np.all(drawn[:, ~WINDOW] < 1e-5) and np.all(drawn[:, WINDOW] > 0.1)


def test_pictures_part_in_the_window_alone():
    policy, cond = policy_of(make_model()), {"bias": jnp.full((4, 1, 1, 1), 0.1)}
    keys, start_keys = (sample_keys(jax.random.key(3), np.arange(4), group_size=size) for size in (1, 4))
    x = np.asarray(jax.jit(policy.rollout)(PARAMS, cond, UNCOND, keys, start_keys, jnp.asarray(WINDOW)).x)
    assert [len(np.unique(x[:, i], axis=0)) for i in range(NUM_STEPS + 1)] == [1, 1, 4, 4, 4, 4]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_in_the_window_equals_scipy(reduction):
    policy = policy_of(make_model(), eta=0.7, guidance_scale=3.0, log_prob_reduction=reduction)
    trajectory, cond = windowed(policy), conditions(3)
    step, x_next = replay(policy, trajectory, cond)
    density = scipy.stats.norm.logpdf(x_next, step.mean, np.maximum(step.std, 1e-30)).reshape(3, NUM_STEPS, -1)
    expected = getattr(density, reduction)(axis=-1)
    np.testing.assert_allclose(trajectory.log_prob[:, WINDOW], expected[:, WINDOW], rtol=1e-5)


def test_one_program_serves_every_window():
    policy = policy_of(make_model())
    program = jax.jit(policy.rollout)
    for first in range(NUM_STEPS):
        noisy = np.arange(NUM_STEPS) == first
        keys = sample_keys(jax.random.key(0), np.arange(3))
        trajectory = program(PARAMS, conditions(3), UNCOND, keys, None, noisy)
        np.testing.assert_array_equal(trajectory.trained[0], noisy)
    assert program._cache_size() == 1
