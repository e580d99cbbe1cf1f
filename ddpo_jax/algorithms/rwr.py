"""Reward-weighted regression: denoising regression on the model's own samples, the better ones weighted more.

The baselines of Black et al. 2023, Sec. 5: dense weights from a softmax of the rewards, and sparse ones of 0 and 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Key

from ddpo_jax.advantages import Advantages
from ddpo_jax.algorithms.ddpo import Carry
from ddpo_jax.algorithms.judged import Judging, judged_rollouts
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.algorithms.regression import Weighted, make_regression
from ddpo_jax.types import Algorithm, Frozen, Prompts, PyTree


def rwr(parts: Parts, *, judging: Judging, weights: Advantages, num_noise_draws: int, guided: bool) -> Algorithm:
    """Regression on a round's own samples.

    weights: of the samples, from their rewards: advantages.softmax or advantages.top_fraction.
    guided: regresses the guided output that was sampled from, as jannerm/ddpo does.
    """
    regression = make_regression(parts, num_noise_draws=num_noise_draws, guided=guided)

    def collect(
        trainable: PyTree, frozen: Frozen, prompts: Prompts, carry: Carry, key: Key[Array, ""]
    ) -> tuple[Weighted, Carry, dict[str, float | int]]:
        judged = judged_rollouts(
            parts,
            judging,
            trainable,
            frozen,
            prompts,
            carry.experts,
            key,
            keep=lambda cond, trajectory, images: (cond, trajectory.x[:, -1]),
        )
        weight, _, history = weights.update(carry.advantages, prompts.id, judged.rewards)
        report = judged.report | {"effective_samples": float(effective_samples(weight))}
        return Weighted(*judged.kept, weight), Carry(judged.seen, history), report

    return Algorithm(
        init=lambda trainable: Carry(judging.experts.init(), weights.init()),
        collect=collect,
        loss=regression.loss,
        slices=regression.slices,
        recompute=None,
        check=lambda first: None,
        stop=lambda scalars: None,
        reads_reference=False,
    )


def effective_samples(weight: np.ndarray) -> float | np.floating:
    """(Σ w)² / Σ w²: how many samples of equal weight would say as much (Kish 1965)."""
    return weight.sum() ** 2 / np.maximum(np.square(weight).sum(), np.finfo(np.float32).tiny)
