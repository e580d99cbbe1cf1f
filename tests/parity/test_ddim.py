"""Our DDIM beside diffusers' DDIMScheduler."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import process

with warnings.catch_warnings():  # what these two warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler

SHAPE = (4, 4, 3)
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


CLIPPED = {"clip_sample": True, "clip_sample_range": 0.7}


def pair(**config):
    config = SCALED_LINEAR | config
    return process.ddim(process.noise_schedule(config)), DDIMScheduler(**config)


def diffusers_chain(scheduler, num_steps):
    """(t, t_prev) of every step as the scheduler itself has them."""
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps.numpy()
    return t, t - scheduler.config.num_train_timesteps // num_steps


def diffusers_transitions(scheduler, prediction, x_t, t, eta):
    """Means and stds of DDIMScheduler.step, the mean by giving it noise of zero."""
    means, stds = [], []
    for i, step in enumerate(t.tolist()):
        noise = torch.zeros(x_t[i].shape)
        out = scheduler.step(
            torch.tensor(prediction[i]), step, torch.tensor(x_t[i]), eta=eta, variance_noise=noise, return_dict=False
        )
        means.append(out[0].numpy())
        previous = step - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        stds.append(eta * scheduler._get_variance(step, previous).sqrt().item())
    return np.stack(means), np.array(stds)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps(spacing, steps_offset):
    ours, theirs = pair(timestep_spacing=spacing, steps_offset=steps_offset)
    for num_steps in [1, 2, 3, 7, 10, 15, 20, 27, 30, 50, 81, 100, 243, 250, 333, 500, 600, 729, 999]:
        t, t_prev = diffusers_chain(theirs, num_steps)
        np.testing.assert_array_equal(ours.timesteps(num_steps), [*t, t_prev[-1]], err_msg=f"{num_steps} steps")


@pytest.mark.parametrize("num_steps", [7, 9, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_end_where_diffusers_ends_them(num_steps, spacing):
    """Also where the next one begins elsewhere."""
    ours, theirs = pair(timestep_spacing=spacing, steps_offset=1)
    t, t_prev = diffusers_chain(theirs, num_steps)
    np.testing.assert_array_equal(ours.timesteps(num_steps)[:-1], t)
    np.testing.assert_array_equal(ours.after(jnp.float32(t), num_steps), t_prev)


@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_transitions(num_steps, eta, prediction_type, spacing, set_alpha_to_one):
    ours, theirs = pair(
        prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one, steps_offset=1
    )
    t, t_prev = diffusers_chain(theirs, num_steps)
    rng = np.random.default_rng(0)
    x_t, prediction, noise = rng.normal(size=(3, num_steps, *SHAPE)).astype(np.float32)
    mean, std = diffusers_transitions(theirs, prediction, x_t, t, eta)
    step = jax.jit(ours.transition, static_argnames="eta")(
        jnp.asarray(prediction), jnp.asarray(x_t), jnp.float32(t), jnp.float32(t_prev), eta=eta
    )
    np.testing.assert_allclose(step.mean, mean, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(step.std[:, 0, 0, 0], std, atol=1e-5)
    np.testing.assert_allclose(
        process.sample(step, jnp.asarray(noise)), mean + std[:, None, None, None] * noise, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("clipping", [{}, CLIPPED], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_whole_rollout(prediction_type, clipping):
    """20 steps, each from the last one's result, with the same noise: errors do not build up."""
    ours, theirs = pair(prediction_type=prediction_type, set_alpha_to_one=False, steps_offset=1, **clipping)
    theirs.set_timesteps(20)
    ts = ours.timesteps(20)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(20, 1, *SHAPE)).astype(np.float32)
    x = x_torch = rng.normal(size=(1, *SHAPE)).astype(np.float32)
    for i, step in enumerate(theirs.timesteps.tolist()):
        x = jnp.asarray(x)
        x = process.sample(
            ours.transition(0.5 * x, x, ts[i : i + 1], ts[i + 1 : i + 2], eta=1.0), jnp.asarray(noise[i])
        )
        x_torch = torch.as_tensor(x_torch)
        x_torch = theirs.step(
            0.5 * x_torch, step, x_torch, eta=1.0, variance_noise=torch.as_tensor(noise[i]), return_dict=False
        )[0]
    np.testing.assert_allclose(x, x_torch, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        SCALED_LINEAR,
        {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.01, 0.02, 200).tolist(), "num_train_timesteps": 200},
    ],
)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_schedules(config, set_alpha_to_one):
    schedule = process.noise_schedule(config | {"set_alpha_to_one": set_alpha_to_one, "clip_sample": False})
    theirs = DDIMScheduler(**config | {"set_alpha_to_one": set_alpha_to_one})
    # Their products are of float32 betas, of which 1 - β of the cosine's last β = 0.999 has four digits left.
    np.testing.assert_allclose(schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-4)
    np.testing.assert_allclose(schedule.final_alpha_bar, theirs.final_alpha_cumprod, rtol=1e-6)


def test_the_folders_of_stable_diffusion():
    """SD 1.5 names PNDM and SDXL Euler; both are the schedule that DDIMScheduler.from_config makes of them."""
    for other in (diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler):
        options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        # By way of JSON: unlike the file, a config in memory remembers which values were defaults, and drops them.
        config = json.loads(other(**options, timestep_spacing="leading").to_json_string())
        schedule = process.noise_schedule(config)
        theirs = DDIMScheduler.from_config(config)
        np.testing.assert_allclose(schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-5)
        np.testing.assert_allclose(schedule.final_alpha_bar, theirs.final_alpha_cumprod, rtol=1e-6)
        theirs.set_timesteps(50)
        np.testing.assert_array_equal(process.ddim(schedule).timesteps(50)[:-1], theirs.timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_targets(prediction_type):
    ours, theirs = pair(prediction_type=prediction_type)
    rng = np.random.default_rng(2)
    x_0, eps = rng.normal(size=(2, 5, *SHAPE)).astype(np.float32)
    t = np.array([0, 1, 250, 750, 999])
    arguments = torch.tensor(x_0), torch.tensor(eps), torch.tensor(t)
    target = theirs.get_velocity(*arguments) if prediction_type == "v_prediction" else eps
    ours_at = jnp.asarray(x_0), jnp.asarray(eps), jnp.float32(t)
    np.testing.assert_allclose(ours.add_noise(*ours_at), theirs.add_noise(*arguments), atol=1e-5)
    np.testing.assert_allclose(ours.target(*ours_at), target, atol=1e-5)
