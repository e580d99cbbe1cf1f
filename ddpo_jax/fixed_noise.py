"""What a run looks like at fixed prompts and fixed noise: pictures and their rewards."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from ddpo_jax import experts, multihost
from ddpo_jax.algorithms.parts import Parts, scored_rollouts
from ddpo_jax.experts import Combination, Scale
from ddpo_jax.types import Frozen, Prompts, PyTree

KEY_INDEX = 2**31 - 1  # folded into the run's key; no epoch reaches it


class Evaluation(NamedTuple):
    images: Float32[np.ndarray, "b H W 3"]
    rewards: Float32[np.ndarray, " b"]  # NaN where missing
    report: dict[str, float | int]
    scale: Scale  # that they were measured by


def evaluate(
    parts: Parts,
    trainable: PyTree,
    frozen: Frozen,
    prompts: Prompts,
    *,
    key_data: Any,
    combination: Combination,
    scale: Scale,
) -> Evaluation:
    """The pictures of `trainable` at these prompts, with the same noise whenever it is called in a run.

    scale: what standardised experts are measured by; these very pictures where it is NaN.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), KEY_INDEX)
    images, scores, _ = scored_rollouts(
        parts, trainable, frozen, prompts, key, keep=lambda cond, trajectory, images: multihost.to_host(images)
    )
    scale = experts.first_known(scale, experts.scale_of(scores))
    rewards = combination.judge(scores, scale)
    return Evaluation(images, rewards, experts.report(parts.reward.names, scores, rewards), scale)
