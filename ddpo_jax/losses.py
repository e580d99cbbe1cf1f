"""Losses of rows: arrays in, one loss a row out, and diagnostics of each row. update.py takes the weighted mean."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.process import REDUCTIONS, choose, standardize, upcast
from ddpo_jax.types import Gaussian, Metrics

ROUNDING = 2e-6  # of the errors in float32: no more than this between two of them is no difference


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


class PairErrors(NamedTuple):
    """Denoising errors of the two pictures of each pair, at one t and one ε, from `denoising_mse`."""

    win: Float[Array, " r"]
    lose: Float[Array, " r"]
    reference_win: Float[Array, " r"]  # of the reference model
    reference_lose: Float[Array, " r"]


def diffusion_dpo(
    errors: PairErrors, preference: Float[Array, " r"], *, beta: float
) -> tuple[Float[Array, " r"], Metrics]:
    """Diffusion-DPO losses, to be minimised.

    L = -p log σ(z) - (1 - p) log σ(-z),  z = -½ β [(m_w - m_l) - (m_w_ref - m_l_ref)]

    Wallace et al. 2023, Eq. 14, as their code has it: m is a *mean* over h, w, c, not weighted by the signal-to-noise
    ratio, and `beta_dpo` stands before a ½ (β = 5000 there, 2000 in the paper's text). p, the preference, is how surely
    the winner wins: 1, or 1 - ε with label smoothing (conservative DPO, Mitchell 2023). At the reference L = log 2.
    """
    z = beta * log_ratio(errors)
    return cross_entropy(z, preference), preference_metrics(errors, z)


def ipo(errors: PairErrors, preference: Float[Array, " r"], *, beta: float) -> tuple[Float[Array, " r"], Metrics]:
    """Identity-preference losses, to be minimised: the margin is drawn to ½, and not on and on.

    L = (z - (p - ½))²,  z and p as in `diffusion_dpo`

    Azar et al. 2023, Eq. 17, times β², so that the loss is of the order of 1 for any β: h = z / β, τ = β.
    """
    z = beta * log_ratio(errors)
    return jnp.square(z - (preference - 0.5)), preference_metrics(errors, z)


def kto(
    error: Float[Array, " r"],
    reference: Float[Array, " r"],
    desirable: Float[Array, " r"],
    baseline: Float[Array, ""],
    *,
    beta: float,
) -> tuple[Float[Array, " r"], Metrics]:
    """Kahneman-Tversky losses of single pictures that are liked (desirable = 1) or not (0), to be minimised.

    L = 1 - σ(β (g - z₀)) if desirable, else 1 - σ(β (z₀ - g)),  g = m_ref - m

    Ethayarajh et al. 2024, Eq. 7; of diffusion models Li et al. 2024 (Diffusion-KTO). z₀, the baseline, is the mean of
    g over everything that is learned from, without a gradient.
    """
    gain = reference - error
    ahead = (2 * desirable - 1) * (gain - jax.lax.stop_gradient(baseline))
    mean = {
        "implicit_accuracy": accuracy(ahead, reference + error),
        "margin": beta * ahead,
        "gain": gain,
        "denoising_mse": error,
    }
    return 1 - jax.nn.sigmoid(beta * ahead), Metrics(mean=mean, max={})


def log_ratio(errors: PairErrors) -> Float[Array, " r"]:
    """-½ [(m_w - m_l) - (m_w_ref - m_l_ref)]: how far the winner has drawn ahead, beside the reference."""
    return -0.5 * ((errors.win - errors.lose) - (errors.reference_win - errors.reference_lose))


def preference_metrics(errors: PairErrors, z: Float[Array, " r"]) -> Metrics:
    """The margin z; how often it is above 0; the errors of both pictures beside the reference's: below 0 is better."""
    mean = {
        "implicit_accuracy": accuracy(log_ratio(errors), sum(errors)),
        "margin": z,
        "win_over_reference": errors.win - errors.reference_win,
        "lose_over_reference": errors.lose - errors.reference_lose,
        "denoising_mse": errors.win,
    }
    return Metrics(mean=mean, max={})


def accuracy(difference: Float[Array, " r"], total: Float[Array, " r"]) -> Float[Array, " r"]:
    """1 where a difference of errors is above 0, 0 where it is below, NaN where rounding alone may have made it.

    total: the sum of those errors. At the reference nothing is decided, and no accuracy is told.
    """
    return jnp.where(jnp.abs(difference) > ROUNDING * total, (difference > 0).astype(jnp.float32), jnp.nan)


def bradley_terry(
    score_0: Float[Array, " r"], score_1: Float[Array, " r"], label: Float[Array, " r"]
) -> tuple[Float[Array, " r"], Metrics]:
    """Cross-entropies of comparisons of two scores, to be minimised.

    L = -p log σ(r_0 - r_1) - (1 - p) log σ(r_1 - r_0)

    Bradley & Terry 1952; as a loss of a reward model Christiano et al. 2017, Eq. 1. p is the label, from 0 to 1: how
    surely the first is preferred. In nats: log 2 where the scores are equal, whatever the label.
    """
    margin = upcast(score_0) - upcast(score_1)
    agreed = (margin > 0) == (label > 0.5)
    return cross_entropy(margin, label), Metrics(
        mean={"margin": jnp.abs(margin), "agreement": agreed.astype(jnp.float32)}, max={}
    )


def cross_entropy(z: Float[Array, " r"], p: Float[Array, " r"]) -> Float[Array, " r"]:
    """-p log σ(z) - (1 - p) log σ(-z), in nats: of a comparison whose log-odds are z, and which is won with p."""
    return p * jax.nn.softplus(-z) + (1 - p) * jax.nn.softplus(z)
