"""Losses of rows: arrays in, one loss a row out, and diagnostics of each row. update.py takes the weighted mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.process import REDUCTIONS, choose, standardize, upcast
from ddpo_jax.types import Gaussian, Metrics


def ppo_clip(
    log_prob: Float[Array, " r"], log_prob_old: Float[Array, " r"], advantage: Float[Array, " r"], *, clip_range: float
) -> tuple[Float[Array, " r"], Metrics]:
    """Clipped surrogate losses, to be minimised.

    L = max(-A r, -A clip(r, 1 - ε, 1 + ε)),  r = exp(log p_θ - log p_old)

    Schulman et al. 2017, Eq. 7; per denoising step as DDPO-IS in Black et al. 2023.
    The published ε = 1e-4 assumes log-probs in nats per latent element (a mean over h, w, c).
    """
    ratio = jnp.exp(log_prob - log_prob_old)
    losses = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))
    clipped = jnp.abs(ratio - 1) > clip_range
    return losses, policy_metrics(log_prob, log_prob_old, clipped.astype(jnp.float32))


def score_function(
    log_prob: Float[Array, " r"], log_prob_old: Float[Array, " r"], advantage: Float[Array, " r"]
) -> tuple[Float[Array, " r"], Metrics]:
    """Score-function (REINFORCE) losses, whose gradient is the policy gradient; their value means nothing.

    L = -A log p_θ

    Williams 1992; per denoising step as DDPO-SF in Black et al. 2023. On policy only: at r = 1 the gradient is that of
    `ppo_clip`, and after an update it is biased.
    """
    return -advantage * log_prob, policy_metrics(log_prob, log_prob_old, jnp.zeros_like(log_prob))


def policy_metrics(
    log_prob: Float[Array, " r"], log_prob_old: Float[Array, " r"], clipped: Float[Array, " r"]
) -> Metrics:
    """How far the policy has moved: approx_kl = ½ Δ² (that of ddpo-pytorch), the ratio exp(Δ), and who was clipped."""
    delta = log_prob - log_prob_old
    return Metrics(
        mean={"approx_kl": 0.5 * jnp.square(delta), "clip_fraction": clipped, "ratio": jnp.exp(delta)},
        max={"ratio_max_deviation": jnp.abs(jnp.expm1(delta))},
    )


def gaussian_kl(p: Gaussian, q: Gaussian, *, reduce: str) -> Float[Array, " b"]:
    """KL(p || q) of two Gaussians of the same std, in nats, per latent element ("mean") or of the whole latent ("sum").

    KL = ‖μ_p - μ_q‖² / (2 σ²);  "mean" divides by the number of elements

    Fan et al. 2023 (DPOK), the KL of each denoising step. σ is that of p; where it is 0, so are KL and gradient.
    """
    z, _ = standardize(p, q.mean)
    return 0.5 * choose(REDUCTIONS, reduce, "reduce")(q.mean) * jnp.mean(jnp.square(z), axis=(1, 2, 3))


def denoising_mse(prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """‖prediction - target‖², a mean over h, w, c, in at least float32. Ho et al. 2020 (DDPM), Eq. 14."""
    return jnp.mean(jnp.square(upcast(prediction) - upcast(target)), axis=(1, 2, 3))


def weighted_mse(error: Float[Array, " r"], weight: Float[Array, " r"]) -> tuple[Float[Array, " r"], Metrics]:
    """Weighted denoising errors, to be minimised.

    L = w e,  e from `denoising_mse`

    Reward-weighted regression in Black et al. 2023; with w = 1, supervised fine-tuning.
    """
    return weight * error, Metrics(mean={"denoising_mse": error, "weight": weight}, max={})


def bradley_terry(
    score_0: Float[Array, " r"], score_1: Float[Array, " r"], label: Float[Array, " r"]
) -> tuple[Float[Array, " r"], Metrics]:
    """Cross-entropies of comparisons of two scores, to be minimised.

    L = -p log σ(r_0 - r_1) - (1 - p) log σ(r_1 - r_0)

    Bradley & Terry 1952; as a loss of a reward model Christiano et al. 2017, Eq. 1. p is the label, from 0 to 1: how
    surely the first is preferred. In nats: log 2 where the scores are equal, whatever the label.
    """
    margin = upcast(score_0) - upcast(score_1)
    losses = label * jax.nn.softplus(-margin) + (1 - label) * jax.nn.softplus(margin)
    agreed = (margin > 0) == (label > 0.5)
    return losses, Metrics(mean={"margin": jnp.abs(margin), "agreement": agreed.astype(jnp.float32)}, max={})
