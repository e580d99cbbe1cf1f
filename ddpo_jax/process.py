"""The maths of a noise process: its schedule, its transitions as Gaussians, and what may be done with such a Gaussian.

One rule lives here: a transition with std 0 is deterministic. It is not trained on, and no density is formed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, PRNGKeyArray, UInt

from ddpo_jax.errors import UserError, number
from ddpo_jax.types import Gaussian, Process


class NoiseSchedule(NamedTuple):
    """How much signal is left at each of T timesteps, and how a sampler walks along them."""

    alpha_bar: Float64[
        np.ndarray, " T"
    ]  # x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε; falls from nearly 1 to nearly 0, reaching neither
    final_alpha_bar: float  # ᾱ of the clean end, where t < 0
    prediction_type: str  # what the network regresses on
    timestep_spacing: str
    steps_offset: int
    clip_range: float | None = None  # the x_0 of a step is cut to ± this; None: it is not. No published model's is


class Prediction(NamedTuple):
    """What a network regresses on, given √ᾱ and √(1 - ᾱ)."""

    target: Callable  # x_0, eps, √ᾱ, √(1 - ᾱ) -> target
    split: Callable  # prediction, x_t, √ᾱ, √(1 - ᾱ) -> x_0, eps


CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # diffusers' schedulers that clip unless their config says otherwise


def choose(table: Mapping[str, Any], name: str, field: str) -> Any:
    """`table[name]`.

    Raises: UserError that names the field, the value and the choices.
    """
    if name not in table:
        raise UserError(f"{field} {name!r} is unknown: expected one of {', '.join(map(repr, table))}")
    return table[name]


def noise_schedule(scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule that a diffusers `scheduler_config.json` describes, whichever scheduler wrote it.

    A missing field has the default of diffusers' DDIMScheduler, as in `DDIMScheduler.from_config`, except
    `clip_sample`: a scheduler that has no such field does not clip.

    Raises: UserError for a process without betas and for settings that are not implemented.
    """
    get = scheduler_config.get
    name = str(get("_class_name", ""))
    if "FlowMatch" in name or "EDM" in name:
        raise UserError(f"{name} has no beta schedule to sample with DDIM: choose a Stable Diffusion 1, 2 or XL folder")
    for field in ("thresholding", "rescale_betas_zero_snr"):
        if get(field, False):
            raise UserError(
                f"{field} true is not supported: expected false, or no such field, in scheduler_config.json"
            )

    num_train_timesteps = number(scheduler_config, "num_train_timesteps", 1000)
    if get("trained_betas") is not None:
        betas = np.asarray(get("trained_betas"), np.float64)
    else:
        make_betas = choose(BETA_SCHEDULES, get("beta_schedule", "linear"), "beta_schedule")
        start, end = (
            number(scheduler_config, *field, kind=float) for field in (("beta_start", 1e-4), ("beta_end", 0.02))
        )
        betas = make_betas(start, end, num_train_timesteps)
    if betas.shape != (num_train_timesteps,):
        raise UserError(
            f"trained_betas has shape {betas.shape}: expected num_train_timesteps = {num_train_timesteps} values"
        )
    if not np.all((betas > 0) & (betas < 1)):
        raise UserError(f"betas lie in [{betas.min()}, {betas.max()}]: expected all of them between 0 and 1, exclusive")

    alpha_bar = np.cumprod(1 - betas)
    prediction_type = get("prediction_type", "epsilon")
    timestep_spacing = get("timestep_spacing", "leading")
    choose(PREDICTION_TYPES, prediction_type, "prediction_type")
    choose(SPACINGS, timestep_spacing, "timestep_spacing")
    return NoiseSchedule(
        alpha_bar=alpha_bar,
        final_alpha_bar=1.0 if get("set_alpha_to_one", True) else float(alpha_bar[0]),
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        steps_offset=number(scheduler_config, "steps_offset", 0, above=-1),
        clip_range=number(scheduler_config, "clip_sample_range", 1.0, kind=float)
        if get("clip_sample", name in CLIPPING)
        else None,
    )


def ddim(schedule: NoiseSchedule) -> Process:
    """The DDIM process: one step removes part of the predicted noise and draws some of it anew.

    σ = η √[(1 - ᾱ')/(1 - ᾱ) · (1 - ᾱ/ᾱ')],  x_next ~ N(√ᾱ' x_0 + √(1 - ᾱ' - σ²) ε, σ²),  with ᾱ = ᾱ_t, ᾱ' = ᾱ_t_next

    Song et al. 2021 (DDIM), Eqs. 12 and 16. η = 0 is deterministic, η = 1 is DDPM's posterior.
    """
    num_train_timesteps = len(schedule.alpha_bar)
    # Of log ᾱ, both ᾱ and 1 - ᾱ have all their digits in float32. 1 - ᾱ of a float32 ᾱ keeps three of them near t = 0.
    log_alpha_bar_table = np.log(schedule.alpha_bar).astype(np.float32)
    log_alpha_bar_final = np.log(schedule.final_alpha_bar).astype(np.float32)
    prediction_type = choose(PREDICTION_TYPES, schedule.prediction_type, "prediction_type")
    spacing = choose(SPACINGS, schedule.timestep_spacing, "timestep_spacing")

    def timesteps(num_steps: int) -> Float32[Array, " {num_steps}+1"]:
        """The timesteps of `num_steps` steps, and where the last one ends: below 0 is the clean end.

        As diffusers' DDIMScheduler spaces and ends them.

        Raises: UserError if there are not so many timesteps.
        """
        if not 1 <= num_steps <= num_train_timesteps:
            raise UserError(f"num_steps {num_steps} is out of range: expected 1 to {num_train_timesteps}")
        t = spacing(num_train_timesteps, num_steps, schedule.steps_offset)
        if t[0] >= num_train_timesteps:
            raise UserError(
                f"num_steps {num_steps} with steps_offset {schedule.steps_offset} starts at t = {t[0]:g}, and the last "
                f"timestep is {num_train_timesteps - 1}: take fewer steps"
            )
        t = jnp.asarray(t, jnp.float32)
        return jnp.concatenate([t, after(t[-1:], num_steps)])

    def after(t: Float[Array, " b"], num_steps: int) -> Float[Array, " b"]:
        """Where a step from t ends: T_train // num_steps below, as in diffusers' DDIMScheduler and the published runs.

        For "leading" that is where the next one begins. For "linspace", and for "trailing" where num_steps does not
        divide T_train, the next begins a little elsewhere; an exported model is then drawn from as it was trained.
        """
        return t - num_train_timesteps // num_steps

    def log_alpha_bar(t: Float[Array, " b"]) -> Float32[Array, "b 1 1 1"]:
        index = jnp.maximum(t, 0).astype(jnp.int32)
        return jnp.where(t >= 0, jnp.asarray(log_alpha_bar_table)[index], log_alpha_bar_final)[:, None, None, None]

    def add_noise(
        x_0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Float[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """x_t = √ᾱ x_0 + √(1 - ᾱ) ε. Ho et al. 2020 (DDPM), Eq. 4."""
        sqrt_alpha_bar, sqrt_beta_bar = amplitudes(log_alpha_bar(t))
        return sqrt_alpha_bar * upcast(x_0) + sqrt_beta_bar * upcast(eps)

    def target(
        x_0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Float[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """What the network regresses on at t."""
        return prediction_type.target(upcast(x_0), upcast(eps), *amplitudes(log_alpha_bar(t)))

    def transition(
        prediction: Float[Array, "b h w c"],
        x_t: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        t_next: Float[Array, " b"],
        *,
        eta: float,
    ) -> Gaussian:
        """p(x_next | x_t), in at least float32. η is from 0 to 1."""
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta} is out of range: expected 0 (deterministic) to 1 (as noisy as DDPM)")
        now, after = log_alpha_bar(t), log_alpha_bar(t_next)
        x_0, eps = prediction_type.split(upcast(prediction), upcast(x_t), *amplitudes(now))
        if schedule.clip_range is not None:
            x_0 = jnp.clip(x_0, -schedule.clip_range, schedule.clip_range)  # ε stays, as in diffusers
        # Of the noise variance 1 - ᾱ', η = 1 draws the part `drawn` anew and keeps the part `kept` of ε, and the two
        # add up to 1. Then 1 - ᾱ' - σ² needs no difference of nearly equal numbers, and is never negative.
        beta_bar, beta_bar_next = -jnp.expm1(now), -jnp.expm1(after)
        drawn = -jnp.expm1(now - after) / beta_bar
        kept = jnp.exp(now - after) * beta_bar_next / beta_bar
        std = eta * jnp.sqrt(beta_bar_next * drawn)
        mean = jnp.exp(after / 2) * x_0 + jnp.sqrt(beta_bar_next * (kept + (1 - eta**2) * drawn)) * eps
        return Gaussian(mean=mean, std=std)

    def sample_timesteps(key: PRNGKeyArray | UInt[Array, " 2"], b: int) -> Float32[Array, " b"]:
        """b draws, uniform over 0 .. T_train - 1."""
        return jax.random.randint(key, (b,), 0, num_train_timesteps).astype(jnp.float32)

    return Process(timesteps, after, add_noise, target, transition, sample_timesteps)


def sample(gaussian: Gaussian, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x_next = μ + σ z, of standard normal noise z."""
    return gaussian.mean + gaussian.std * noise


def stochastic(gaussian: Gaussian) -> Bool[Array, " b"]:
    """Whether the transition has a density (σ > 0), and so can be trained on."""
    return gaussian.std[:, 0, 0, 0] > 0


def log_prob(gaussian: Gaussian, x: Float[Array, "b h w c"], *, reduce: str) -> Float32[Array, " b"]:
    """log p(x) in nats, per latent element ("mean") or of the whole latent ("sum"); 0 where deterministic.

    log p = -½ Σ (z² - 1) - D (log σ + ½ log 2πe),  z = (x - μ)/σ,  over all D elements; "mean" divides by D

    "mean" is what Black et al. 2023 (DDPO) publish, and their clip range assumes it.
    """
    size = choose(REDUCTIONS, reduce, "reduce")(x)
    z, std = standardize(gaussian, x)
    # Of samples of this very Gaussian z² - 1 averages to 0, so its sum stays small and rounds less than that of z²:
    # two programs add in different orders, and then agree on the ratio to 6e-8, not 6e-7 (CPU, latents of 8 to 128).
    entropy = jnp.log(std)[:, 0, 0, 0] + 0.5 * np.log(2 * np.pi * np.e)
    log_p = -size * (0.5 * jnp.mean(jnp.square(z) - 1, axis=(1, 2, 3)) + entropy)
    return jnp.where(stochastic(gaussian), log_p, 0.0).astype(jnp.float32)


def standardize(
    gaussian: Gaussian, x: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 1 1 1"]]:
    """z = (x - μ)/σ, and σ; 0 and 1 where the transition is deterministic, with gradients of 0."""
    # Both the difference and its divisor are replaced before they meet: a `where` after it would let 0 x NaN through
    # in the gradient.
    is_stochastic = gaussian.std > 0
    std = jnp.where(is_stochastic, gaussian.std, 1.0)
    return jnp.where(is_stochastic, upcast(x) - gaussian.mean, 0.0) / std, std


def amplitudes(log_alpha_bar: Float[Array, "b 1 1 1"]) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    """√ᾱ and √(1 - ᾱ)."""
    return jnp.exp(log_alpha_bar / 2), jnp.sqrt(-jnp.expm1(log_alpha_bar))


def upcast(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear_betas(start: float, end: float, num: int) -> Float64[np.ndarray, " T"]:
    """Betas as in Ho et al. 2020 (DDPM)."""
    return np.linspace(start, end, num)


def scaled_linear_betas(start: float, end: float, num: int) -> Float64[np.ndarray, " T"]:
    """Betas whose square roots are linear, as in Rombach et al. 2022 (latent diffusion)."""
    return np.linspace(start**0.5, end**0.5, num) ** 2


def cosine_betas(_start: float, _end: float, num: int) -> Float64[np.ndarray, " T"]:
    """Betas of ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), at most 0.999. Nichol & Dhariwal 2021, Eq. 17."""
    alpha_bar = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def leading(num_train_timesteps: int, num_steps: int, steps_offset: int) -> Float64[np.ndarray, " T"]:
    """Multiples of T_train // num_steps from 0, falling, plus the offset."""
    return np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps) + float(steps_offset)


def trailing(num_train_timesteps: int, num_steps: int, steps_offset: int) -> Float64[np.ndarray, " T"]:
    """Multiples of T_train / num_steps, falling from the last timestep; no offset."""
    # Cut to num_steps because the rounding of a float step can append one more.
    return np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)[:num_steps]) - 1


def linspace(num_train_timesteps: int, num_steps: int, steps_offset: int) -> Float64[np.ndarray, " T"]:
    """Evenly from the last timestep to 0, both included; no offset."""
    return np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1]


BETA_SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "squaredcos_cap_v2": cosine_betas}

SPACINGS = {"leading": leading, "trailing": trailing, "linspace": linspace}

REDUCTIONS = {"mean": lambda x: 1, "sum": lambda x: x[0].size}  # how many elements' worth of the mean

# For "v_prediction", v = √ᾱ ε - √(1 - ᾱ) x_0: Salimans & Ho 2022, Appendix D.
PREDICTION_TYPES = {
    "epsilon": Prediction(
        target=lambda x_0, eps, sqrt_alpha_bar, sqrt_beta_bar: eps,
        split=lambda eps, x_t, sqrt_alpha_bar, sqrt_beta_bar: ((x_t - sqrt_beta_bar * eps) / sqrt_alpha_bar, eps),
    ),
    "v_prediction": Prediction(
        target=lambda x_0, eps, sqrt_alpha_bar, sqrt_beta_bar: sqrt_alpha_bar * eps - sqrt_beta_bar * x_0,
        split=lambda v, x_t, sqrt_alpha_bar, sqrt_beta_bar: (
            sqrt_alpha_bar * x_t - sqrt_beta_bar * v,
            sqrt_alpha_bar * v + sqrt_beta_bar * x_t,
        ),
    ),
}
