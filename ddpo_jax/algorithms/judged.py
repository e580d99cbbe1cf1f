"""A round of samples with one reward each, and the run stopped where too many have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Key

from ddpo_jax import experts
from ddpo_jax.algorithms.parts import Parts, scored_rollouts
from ddpo_jax.experts import Combination
from ddpo_jax.types import Frozen, Prompts, PyTree


class Judging(NamedTuple):
    """From pictures to rewards."""

    experts: Combination
    max_missing: float  # fraction of a round
    group_size: int = 1  # samples in a row that start from the same noise


class Judged(NamedTuple):
    """A round of samples with their rewards."""

    kept: PyTree
    scores: Float32[np.ndarray, "b experts"]  # NaN where missing
    rewards: Float32[np.ndarray, " b"]  # NaN where missing
    seen: PyTree  # of the experts, for the next round
    report: dict[str, float | int]


def judged_rollouts(
    parts: Parts,
    judging: Judging,
    trainable: PyTree,
    frozen: Frozen,
    prompts: Prompts,
    seen: PyTree,
    key: Key[Any, ""],
    *,
    keep: Callable,
    noisy: Bool[Any, " T"] | None = None,
) -> Judged:
    """One sample a prompt, and its reward. keep, noisy: as in `scored_rollouts`.

    Raises: RunStopped if more than `max_missing` of the rewards are missing, as soon as that is known.
    """
    names = parts.reward.names

    def check(scores: Float32[np.ndarray, "n experts"], why: str) -> None:
        rewards, _ = judging.experts.update(seen, scores)
        experts.check_missing(
            rewards, scores, max_missing=judging.max_missing, names=names, why=why, count=len(prompts.texts)
        )

    kept, scores, why = scored_rollouts(
        parts,
        trainable,
        frozen,
        prompts,
        key,
        keep=keep,
        group_size=judging.group_size,
        noisy=noisy,
        check=check,
    )
    rewards, seen = judging.experts.update(seen, scores)
    experts.check_missing(rewards, scores, max_missing=judging.max_missing, names=names, why=why)
    return Judged(kept, scores, rewards, seen, experts.report(names, scores, rewards))
