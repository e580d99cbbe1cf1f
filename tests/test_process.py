"""The noise process: what it must satisfy whatever the schedule, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.types import Gaussian

STABLE_DIFFUSION = {  # what SD 1.5's folder holds: PNDM, and neither prediction type nor spacing
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SHAPE = (3, 4, 5, 2)


def ddim(**changes):
    return process.ddim(process.noise_schedule(STABLE_DIFFUSION | changes))


def normal(seed, shape=SHAPE, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def column(*values):
    return jnp.array(values, jnp.float32)


def gaussian(std, seed=0, shape=SHAPE):
    return Gaussian(normal(seed, shape), jnp.broadcast_to(jnp.float32(std), (shape[0],))[:, None, None, None])


# --- timesteps


def test_stable_diffusion_walks_as_published():
    t = np.asarray(ddim().timesteps(50))
    assert t.dtype == np.float32
    assert t.tolist() == [*range(981, 0, -20), -19]


@pytest.mark.parametrize(
    ("spacing", "num_steps", "expected"),
    [
        ("leading", 3, [667, 334, 1, -332]),
        ("trailing", 3, [999, 666, 332, -1]),
        ("trailing", 4, [999, 749, 499, 249, -1]),
        ("linspace", 3, [999, 500, 0, -333]),
        ("linspace", 1, [0, -1000]),
    ],
)
def test_spacings(spacing, num_steps, expected):
    assert ddim(timestep_spacing=spacing).timesteps(num_steps).tolist() == expected


@pytest.mark.parametrize("spacing", process.SPACINGS)
def test_timesteps_fall_and_stay_in_the_schedule(spacing):
    noise_process = ddim(timestep_spacing=spacing, steps_offset=0)
    for num_steps in [*range(1, 60), *range(60, 1000, 47), 999, 1000]:
        t = np.asarray(noise_process.timesteps(num_steps))
        assert len(t) == num_steps + 1
        assert np.all(np.diff(t) < 0)
        assert t[0] <= 999
        assert t[-2] >= 0


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_num_steps_out_of_range(num_steps):
    with pytest.raises(UserError, match=rf"num_steps {num_steps} is out of range: expected 1 to 1000"):
        ddim().timesteps(num_steps)


def test_an_offset_beyond_the_schedule_is_refused():
    with pytest.raises(UserError, match=r"steps_offset 1 starts at t = 1000"):
        ddim().timesteps(1000)


# --- noise_schedule


def test_missing_fields_have_the_defaults_of_ddim():
    schedule = process.noise_schedule({})
    assert schedule.prediction_type == "epsilon"
    assert schedule.timestep_spacing == "leading"
    assert schedule.steps_offset == 0
    assert schedule.final_alpha_bar == 1.0
    assert schedule.alpha_bar.shape == (1000,)
    np.testing.assert_allclose(schedule.alpha_bar[0], 1 - 1e-4)


def test_trained_betas_come_first():
    schedule = process.noise_schedule({"trained_betas": [0.5, 0.5], "num_train_timesteps": 2, "beta_schedule": "none"})
    assert schedule.alpha_bar.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r"beta_schedule 'sigmoid' is unknown: .*'linear', 'scaled_linear', 'squaredcos"),
        ({"prediction_type": "sample"}, r"prediction_type 'sample' is unknown: .*'epsilon', 'v_prediction'"),
        ({"timestep_spacing": "karras"}, r"timestep_spacing 'karras' is unknown: .*'leading', 'trailing', 'linspace'"),
        ({"thresholding": True}, "thresholding true is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true is not supported"),
        ({"trained_betas": [0.1, 0.2]}, r"shape \(2,\): expected num_train_timesteps = 1000"),
        ({"beta_end": 1.0}, r"betas lie in .*: expected all of them between 0 and 1"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler has no beta schedule"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler has no beta schedule"),
    ],
)
def test_settings_that_cannot_be_sampled(changes, message):
    with pytest.raises(UserError, match=message):
        process.noise_schedule(STABLE_DIFFUSION | changes)


# --- add_noise, target, transition


@pytest.mark.parametrize("prediction_type", process.PREDICTION_TYPES)
def test_a_perfect_prediction_steps_onto_the_data(prediction_type):
    """η = 0 and the clean end at ᾱ = 1: the mean is x_0 itself; elsewhere it is x_0 at t_next with the same noise."""
    noise_process = ddim(prediction_type=prediction_type, set_alpha_to_one=True)
    x_0, eps = normal(0), normal(1)
    t, t_next = column(1, 301, 601), column(-19, 281, 581)
    x_t = noise_process.add_noise(x_0, eps, t)
    step = noise_process.transition(noise_process.target(x_0, eps, t), x_t, t, t_next, eta=0.0)
    np.testing.assert_allclose(step.mean[0], x_0[0], atol=1e-5)
    np.testing.assert_allclose(step.mean, noise_process.add_noise(x_0, eps, t_next), atol=1e-5)


def test_prediction_types_describe_the_same_transition():
    x_0, eps, t, t_next = normal(0), normal(1), column(981, 501, 1), column(961, 481, -19)
    steps = [
        noise_process.transition(
            noise_process.target(x_0, eps, t), noise_process.add_noise(x_0, eps, t), t, t_next, eta=1.0
        )
        for noise_process in [ddim(prediction_type=name) for name in process.PREDICTION_TYPES]
    ]
    np.testing.assert_allclose(steps[0].mean, steps[1].mean, atol=1e-5)
    np.testing.assert_array_equal(steps[0].std, steps[1].std)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_transition_keeps_the_marginal(eta):
    """Stepping x_t of given x_0 gives x_t_next of x_0: the noise kept and the noise drawn add up to 1 - ᾱ'."""
    noise_process = ddim()
    t, t_next = column(981, 501, 21), column(961, 481, 1)
    zero, one = jnp.zeros(SHAPE), jnp.ones(SHAPE)
    step = noise_process.transition(one, noise_process.add_noise(zero, one, t), t, t_next, eta=eta)
    expected = noise_process.add_noise(zero, one, t_next)
    np.testing.assert_allclose(jnp.sqrt(step.mean**2 + step.std**2), expected, rtol=2e-5)


def test_noise_of_a_worked_step():
    """Two betas of 1/2: ᾱ = 1/2, 1/4, and so σ² = (1/2)/(3/4) · (1 - (1/4)/(1/2)) = 1/3."""
    noise_process = ddim(trained_betas=[0.5, 0.5], num_train_timesteps=2)
    step = noise_process.transition(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), column(1), column(0), eta=1.0)
    np.testing.assert_allclose(step.std.item() ** 2, 1 / 3, rtol=1e-6)
    # x_0 = -√(3/4)/√(1/4) = -√3, μ = √(1/2) x_0 + √(1/2 - 1/3)
    np.testing.assert_allclose(step.mean.item(), -np.sqrt(1.5) + np.sqrt(1 / 6), rtol=1e-5)


def test_the_noise_of_one_timestep_beside_the_data_has_all_its_digits():
    """σ at t = 1, by float64: 1 - ᾱ of a float32 ᾱ would be 1e-5 off, and so would ratios of two programs."""
    alpha_bar = process.noise_schedule(STABLE_DIFFUSION).alpha_bar
    expected = np.sqrt((1 - alpha_bar[0]) / (1 - alpha_bar[1]) * (1 - alpha_bar[1] / alpha_bar[0]))
    step = ddim().transition(normal(0, (1, 2, 2, 1)), normal(1, (1, 2, 2, 1)), column(1), column(-19), eta=1.0)
    np.testing.assert_allclose(step.std.item(), expected, rtol=5e-7)


@pytest.mark.parametrize("beta_schedule", process.BETA_SCHEDULES)
@pytest.mark.parametrize("spacing", process.SPACINGS)
def test_every_transition_is_finite(beta_schedule, spacing):
    noise_process = ddim(beta_schedule=beta_schedule, timestep_spacing=spacing, steps_offset=0)
    t = noise_process.timesteps(100)
    x = normal(0, (100, 2, 2, 1))
    for eta in (0.0, 0.5, 1.0):
        step = noise_process.transition(x, x, t[:-1], t[1:], eta=eta)
        assert np.all(np.isfinite(step.mean))
        assert np.all(np.isfinite(step.std))


@pytest.mark.parametrize(
    ("changes", "t", "t_next", "eta"),
    [
        ({}, 981, 961, 0.0),  # DDIM proper
        ({"set_alpha_to_one": True}, 1, -19, 1.0),  # the last step ends at the data
        ({"timestep_spacing": "linspace"}, 0, -20, 1.0),  # the last step starts where it ends
    ],
)
def test_where_a_transition_is_deterministic(changes, t, t_next, eta):
    x = normal(0, (1, 2, 2, 1))
    step = jax.jit(lambda t, t_next: ddim(**changes).transition(x, x, t, t_next, eta=eta))(column(t), column(t_next))
    assert step.std.item() == 0
    assert process.stochastic(step).tolist() == [False]
    assert process.sample(step, normal(1, x.shape)).tolist() == step.mean.tolist()


def test_half_precision_is_computed_in_float32():
    noise_process = ddim()
    x, eps = normal(0, dtype=jnp.bfloat16), normal(1, dtype=jnp.bfloat16)
    t, t_next = column(981, 501, 1), column(961, 481, -19)
    step = noise_process.transition(eps, x, t, t_next, eta=1.0)
    wide = noise_process.transition(eps.astype(jnp.float32), x.astype(jnp.float32), t, t_next, eta=1.0)
    assert step.mean.dtype == step.std.dtype == jnp.float32
    assert step.mean.tolist() == wide.mean.tolist()
    assert noise_process.add_noise(x, eps, t).dtype == jnp.float32
    assert noise_process.target(x, eps, t).dtype == jnp.float32
    assert process.log_prob(step, x, reduce="mean").dtype == jnp.float32


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta):
    with pytest.raises(UserError, match=f"eta {eta} is out of range"):
        ddim().transition(normal(0), normal(1), column(3, 2, 1), column(2, 1, 0), eta=eta)


def test_training_timesteps_are_uniform_integers():
    t = np.asarray(ddim().sample_timesteps(jax.random.key(0), 20_000))
    assert t.dtype == np.float32
    np.testing.assert_array_equal(t, np.round(t))
    assert t.min() == 0
    assert t.max() == 999
    # The mean of 20,000 draws is within 4 standard errors of 499.5.
    assert abs(t.mean() - 499.5) < 4 * 288.7 / np.sqrt(20_000)


# --- log_prob


@pytest.mark.parametrize(("reduce", "total"), [("mean", np.mean), ("sum", np.sum)])
def test_log_prob_is_that_of_a_normal(reduce, total):
    step = Gaussian(normal(0), column(0.02, 0.3, 1.7)[:, None, None, None])
    x = process.sample(step, 1.3 * normal(1))
    density = scipy.stats.norm.logpdf(np.float64(x), np.float64(step.mean), np.float64(step.std))
    np.testing.assert_allclose(process.log_prob(step, x, reduce=reduce), total(density, axis=(1, 2, 3)), rtol=1e-5)


def test_an_unknown_reduction():
    with pytest.raises(UserError, match=r"reduce 'max' is unknown: expected one of 'mean', 'sum'"):
        process.log_prob(gaussian(1.0), normal(1), reduce="max")


@pytest.mark.parametrize("reduce", process.REDUCTIONS)
def test_log_prob_of_a_deterministic_transition_is_0_with_finite_gradients(reduce):
    mean, std, x = normal(0), column(0, 0.5, 0)[:, None, None, None], normal(1)

    def loss(mean, std, x):
        return jnp.sum(process.log_prob(Gaussian(mean, std), x, reduce=reduce))

    log_p = process.log_prob(Gaussian(mean, std), x, reduce=reduce)
    assert log_p[0] == log_p[2] == 0
    assert log_p[1] != 0
    for gradient in jax.grad(loss, (0, 1, 2))(mean, std, x):
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[0])
        assert np.any(gradient[1])
    with jax.debug_nans(True):
        jax.grad(loss)(mean, std, x)


def test_an_unguarded_deterministic_transition_trains_nothing():
    """Through the process, as training would: η = 0, where nothing may be learnt and nothing may break."""
    noise_process, t, t_next = ddim(), column(981, 501, 1), column(961, 481, -19)

    def loss(prediction):
        step = noise_process.transition(prediction, normal(1), t, t_next, eta=0.0)
        return jnp.sum(process.log_prob(step, normal(2), reduce="mean"))

    assert not np.any(jax.grad(loss)(normal(0)))


@pytest.mark.parametrize("shape", [(16, 16, 4), (64, 64, 4)])
def test_two_programs_agree_on_the_log_prob(shape):
    """A scanned rollout and a jitted update on shuffled rows, at guidance 5: the ratio is 1 to a part of ε = 1e-4."""
    noise_process, num_steps, b = ddim(), 20, 2
    ts = noise_process.timesteps(num_steps)

    def transition(x_t, t, t_next):
        rolled = jnp.roll(x_t, 1, axis=2)
        uncond, cond = jnp.tanh(x_t + 0.1 * rolled), jnp.tanh(1.1 * x_t - 0.1 * rolled)
        return noise_process.transition(uncond + 5.0 * (cond - uncond), x_t, t, t_next, eta=1.0)

    @jax.jit
    def rollout(x, noise):
        def step(x, inputs):
            t, t_next, z = inputs
            gaussian = transition(x, jnp.full(b, t), jnp.full(b, t_next))
            x_next = process.sample(gaussian, z)
            return x_next, (x, x_next, process.log_prob(gaussian, x_next, reduce="mean"))

        return jax.lax.scan(step, x, (ts[:-1], ts[1:], noise))[1]

    @jax.jit
    def update(x_t, x_next, t, t_next):
        return process.log_prob(transition(x_t, t, t_next), x_next, reduce="mean")

    x_t, x_next, log_prob = rollout(normal(0, (b, *shape)), normal(1, (num_steps, b, *shape)))
    order = np.random.default_rng(0).permutation(num_steps)
    for i in range(b):
        again = update(x_t[order, i], x_next[order, i], ts[:-1][order], ts[1:][order])
        assert np.max(np.abs(np.expm1(again - log_prob[order, i]))) < 5e-6


@pytest.mark.parametrize(
    ("changes", "clip_range"),
    [
        ({}, None),
        ({"clip_sample": True}, 1.0),
        ({"clip_sample": True, "clip_sample_range": 2.0}, 2.0),
        ({"clip_sample": None, "_class_name": "DDIMScheduler"}, None),
    ],
)
def test_clipping_is_as_the_folder_says(changes, clip_range):
    assert process.noise_schedule(STABLE_DIFFUSION | changes).clip_range == clip_range


def test_clipping_where_the_folder_says_nothing():
    """diffusers' DDIMScheduler clips then; others do not know of it."""
    silent = {name: value for name, value in STABLE_DIFFUSION.items() if name != "clip_sample"}
    assert process.noise_schedule(silent | {"_class_name": "DDIMScheduler"}).clip_range == 1.0
    assert process.noise_schedule(silent | {"_class_name": "EulerDiscreteScheduler"}).clip_range is None
