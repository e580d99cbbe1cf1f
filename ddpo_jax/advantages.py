"""Rewards -> advantages, on the host: (init, update) pairs whose carry is an array tree, checkpointed with the run.

A missing reward is NaN. It enters no statistics, its own advantage and weight are 0, and all other advantages are
exactly those of a batch (or group) without it. Statistics are taken in float64 of float32 rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from ddpo_jax.errors import UserError


class Advantages(NamedTuple):
    """How good each sample is beside others."""

    init: Callable  # () -> carry
    update: Callable  # carry, ids (b,), rewards (b,) -> advantage (b,) float32, weight (b,) float32 0 or 1, carry


class History(NamedTuple):
    """The last rewards of every prompt, `count` of them, in a ring: the next is written at `position`."""

    values: Float[Any, "prompts buffer"]
    count: Int[Any, " prompts"]
    position: Int[Any, " prompts"]


def whiten(*, eps: float = 1e-8) -> Advantages:
    """Advantages over the whole batch.

    A = (r - mean(r)) / (std(r) + ε)

    ddpo-pytorch without per-prompt statistics; its ε.
    """

    def init() -> tuple[()]:
        return ()

    def update(
        carry: tuple[()], ids: Int[Any, " b"], rewards: Float[np.ndarray, " b"]
    ) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"], tuple[()]]:
        present = np.isfinite(rewards)
        return *_scatter(present, _standardise(rewards[present], rewards[present], eps)), carry

    return Advantages(init, update)


def per_group(*, size: int, eps: float = 1e-6) -> Advantages:
    """Advantages over the `size` samples of one draw of a prompt, which stand in a row.

    A_i = (r_i - mean(g)) / (std(g) + ε),  g the rewards of sample i's group

    Shao et al. 2024 (GRPO), Sec. 4.1.2; ε as in `per_prompt`. Where the samples of a group also start from the same
    noise, as in Xue et al. 2025 (DanceGRPO), nothing is left in A but what the denoising steps drew. ids are not read.

    Raises: UserError if a group has fewer than two samples; from `update` if the batch is not of whole groups.
    """
    if size < 2:
        raise UserError(
            f"a group of {size} has nothing to be compared with: set sample.num_samples_per_prompt to 2 or more"
        )

    def init() -> tuple[()]:
        return ()

    def update(
        carry: tuple[()], ids: Int[Any, " b"], rewards: Float[np.ndarray, " b"]
    ) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"], tuple[()]]:
        if len(rewards) % size:
            raise UserError(f"{len(rewards)} rewards are not groups of {size}")
        advantage, present = np.zeros(len(rewards)), np.isfinite(rewards)
        for first in range(0, len(rewards), size):
            own = np.arange(first, first + size)[present[first : first + size]]
            advantage[own] = _standardise(rewards[own], rewards[own], eps)
        return advantage.astype(np.float32), present.astype(np.float32), carry

    return Advantages(init, update)


def per_prompt(*, num_prompts: int, buffer_size: int, min_count: int, eps: float = 1e-6) -> Advantages:
    """Advantages over the last `buffer_size` rewards of the same prompt, this batch's own among them.

    A_i = (r_i - mean(h)) / (std(h) + ε),  h the history of sample i's prompt after this batch was added to it

    While a prompt has fewer than `min_count` rewards, mean and std are those of the whole batch. Black et al. 2023
    (DDPO); the order of these steps and ε are those of ddpo-pytorch. ids are positions in the prompt list.

    Raises: UserError if min_count is not in 1..buffer_size; from `update` for an id outside the prompt list.
    """
    if not 1 <= min_count <= buffer_size:
        raise UserError(
            f"per_prompt_stat_tracking.min_count {min_count} must be from 1 to buffer_size {buffer_size}: "
            "no prompt's history grows longer than that"
        )

    def init() -> History:
        # float32 holds the rewards exactly, and survives a checkpoint where JAX has no float64.
        return History(
            values=np.zeros((num_prompts, buffer_size), np.float32),
            count=np.zeros(num_prompts, np.int32),
            position=np.zeros(num_prompts, np.int32),
        )

    def update(
        carry: History, ids: Int[Any, " b"], rewards: Float[np.ndarray, " b"]
    ) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"], History]:
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= num_prompts):
            raise UserError(f"prompt ids from {ids.min()} to {ids.max()} must be positions in a list of {num_prompts}")
        present = np.isfinite(rewards)
        seen, found = ids[present], rewards[present]
        history = _extend(carry, seen, found)
        advantage = _standardise(found, found, eps)
        for prompt in np.unique(seen):
            count = history.count[prompt]
            if count >= min_count:
                own = seen == prompt
                advantage[own] = _standardise(found[own], history.values[prompt, :count], eps)
        return *_scatter(present, advantage), history

    return Advantages(init, update)


def softmax(*, temperature: float, by_prompt: bool) -> Advantages:
    """Weights to regress with, 1 on average: the better, the heavier.

    w_i = N softmax(r / T)_i,  over the whole batch, or over the N samples of the same prompt

    Reward-weighted regression in Black et al. 2023 (Peters & Schaal 2007); jannerm/ddpo has 1 / T = 0.2, by prompt in
    the aesthetic run. An infinite T makes all alike: a control.

    Raises: UserError if the temperature is not positive.
    """
    if not temperature > 0:
        raise UserError(f"rwr.temperature={temperature}: expected a positive number; 5 is the published value")

    def update(
        carry: tuple[()], ids: Int[Any, " b"], rewards: Float[np.ndarray, " b"]
    ) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"], tuple[()]]:
        present = np.isfinite(rewards)
        groups = np.asarray(ids) if by_prompt else np.zeros(len(rewards), int)
        weights = np.zeros(len(rewards))
        for group in np.unique(groups[present]):
            own = present & (groups == group)
            scaled = rewards[own].astype(np.float64) / temperature
            unnormalised = np.exp(scaled - scaled.max())
            weights[own] = own.sum() * unnormalised / unnormalised.sum()
        return weights.astype(np.float32), present.astype(np.float32), carry

    return Advantages(tuple, update)


def top_fraction(*, fraction: float, by_prompt: bool) -> Advantages:
    """Weights of 1 for the best `fraction` of the batch (or of each prompt's samples), 0 for the others.

    Sparse reward-weighted regression in Black et al. 2023: of 10,240 samples a round the best tenth. At least one is
    kept; of equal ones the first.

    Raises: UserError if the fraction is not from above 0 to 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"rwr.top_fraction={fraction}: expected more than 0, at most 1; 0.1 is the published value")

    def update(
        carry: tuple[()], ids: Int[Any, " b"], rewards: Float[np.ndarray, " b"]
    ) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"], tuple[()]]:
        present = np.isfinite(rewards)
        groups = np.asarray(ids) if by_prompt else np.zeros(len(rewards), int)
        kept = np.zeros(len(rewards), np.float32)
        for group in np.unique(groups[present]):
            own = np.flatnonzero(present & (groups == group))
            best = own[np.argsort(-rewards[own], kind="stable")]
            kept[best[: max(1, round(fraction * len(own)))]] = 1
        return kept, kept.copy(), carry

    return Advantages(tuple, update)


def clip(advantage: Float32[np.ndarray, " b"], *, adv_clip_max: float) -> Float32[np.ndarray, " b"]:
    """The advantage within ±adv_clip_max, so that one outlier cannot be a whole update. Published: 5 and 10."""
    return np.clip(advantage, -adv_clip_max, adv_clip_max)


def _extend(history: History, ids: Int[np.ndarray, " n"], rewards: Float[np.ndarray, " n"]) -> History:
    # np.array copies: the carry of the last round may be in a checkpoint that is being written.
    values, count, position = (np.array(leaf) for leaf in history)
    buffer_size = values.shape[1]
    for prompt, reward in zip(ids, rewards, strict=True):
        values[prompt, position[prompt]] = reward
        position[prompt] = (position[prompt] + 1) % buffer_size
        count[prompt] = min(count[prompt] + 1, buffer_size)
    return History(values, count, position)


def _standardise(
    rewards: Float[np.ndarray, " n"], among: Float[np.ndarray, " m"], eps: float
) -> Float[np.ndarray, " n"]:
    if not len(rewards):
        return np.zeros(0)
    among = among.astype(np.float64)
    return (rewards - among.mean()) / (among.std() + eps)


def _scatter(
    present: Bool[np.ndarray, " b"], values: Float[np.ndarray, " n"]
) -> tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"]]:
    advantage = np.zeros(len(present), np.float32)
    advantage[present] = values
    return advantage, present.astype(np.float32)
