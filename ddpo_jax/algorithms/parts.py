"""What the methods share: the parts they are made of, and a scored round of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Key

from ddpo_jax import rewards
from ddpo_jax.policy import sample_keys
from ddpo_jax.types import Frozen, Model, Policy, Prompts, PyTree, Reward


class Parts(NamedTuple):
    """What a method may draw on."""

    model: Model
    policy: Policy
    sample: Callable  # policy.make_sampler's program
    reward: Reward | None  # None where the method needs none
    phase: Callable  # name, total -> context manager that gives advance(count)
    chunk_size: int  # pictures a program call


def scored_rollouts(
    parts: Parts,
    trainable: PyTree,
    frozen: Frozen,
    prompts: Prompts,
    key: Key[Any, ""],
    *,
    keep: Callable,
    group_size: int = 1,
) -> tuple[PyTree, Float32[np.ndarray, "b experts"]]:
    """One sample a prompt, and its scores: keep(cond, trajectory, images) of all samples, with a leading axis of b.

    Chunks have one shape, so that one program serves every count: the last is filled up with its last prompt. A chunk
    is scored while the next rolls out. Sample i's noise depends on `key` and i alone; what it starts from is shared by
    `group_size` samples in a row.
    """
    count, size = len(prompts.texts), parts.chunk_size
    kept, pending = [], []
    with parts.phase("rollout", count) as advance:
        for first in range(0, count, size):
            chunk = rewards.take(prompts, np.minimum(np.arange(first, first + size), count - 1))
            keys, start_keys = sample_keys(key, first, size), sample_keys(key, first, size, group_size=group_size)
            cond, trajectory, images = parts.sample(trainable, frozen, chunk.tokens, keys, start_keys)
            pending.append(parts.reward.submit(frozen.reward, images, chunk))
            kept.append(keep(cond, trajectory, images))
            jax.block_until_ready(kept[-2:-1])  # the chunk before: one is always under way
            advance(min(size, count - first))
        jax.block_until_ready(kept)
    scores = []
    with parts.phase("reward", count) as advance:
        while pending:
            scores.append(parts.reward.result(pending.pop(0)))
            advance(min(size, count - size * (len(scores) - 1)))
    return jax.tree.map(lambda *chunks: concatenate(chunks, count), *kept), np.concatenate(scores)[:count]


def reward_report(
    names: tuple[str, ...], scores: Float[np.ndarray, "b experts"], rewards: Float[np.ndarray, " b"]
) -> dict[str, float | int]:
    """Mean and standard deviation of the rewards that are there, how many are missing, and each expert's mean."""
    found = rewards[np.isfinite(rewards)]
    report = {
        "reward/mean": float(found.mean()) if len(found) else float("nan"),
        "reward/std": float(found.std()) if len(found) else float("nan"),
        "reward/missing": len(rewards) - len(found),
    }
    for name, column in zip(names, scores.T, strict=True):
        seen = column[np.isfinite(column)]
        report[f"reward/{name}"] = float(seen.mean()) if len(seen) else float("nan")
    return report


def concatenate(chunks: tuple, count: int):
    """The first `count` rows of the chunks, on the device or on the host as they are."""
    join = np.concatenate if isinstance(chunks[0], np.ndarray) else jax.numpy.concatenate
    return join(chunks)[:count]
