"""Pairs from scored samples: the best of a draw against the worst of it, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from ddpo_jax.errors import UserError


class Chosen(NamedTuple):
    """Positions of pairs in the batch."""

    win: Int[np.ndarray, " n"]
    lose: Int[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]  # False where the two are no better than each other, or a score is missing


def best_against_worst(rewards: Float[np.ndarray, " b"], *, group_size: int, num_pairs: int) -> Chosen:
    """The k-th best of each group in a row against its k-th worst, for k from 1 to `num_pairs`.

    Best-K / worst-K mining; K = 1 is the usual choice. NaN is missing. Equal rewards make no pair.

    Raises: UserError if a group does not have 2 K samples.
    """
    if not 1 <= num_pairs <= group_size // 2:
        raise UserError(
            f"dpo.num_pairs={num_pairs}: expected 1 to {group_size // 2}, half of"
            f" sample.num_samples_per_prompt={group_size}"
        )
    wins, loses, valid = [], [], []
    for first in range(0, len(rewards), group_size):
        own = rewards[first : first + group_size]
        present = np.flatnonzero(np.isfinite(own))
        order = present[np.argsort(-own[present], kind="stable")]
        for k in range(num_pairs):
            there = 2 * (k + 1) <= len(order)
            win, lose = (order[k], order[-1 - k]) if there else (0, 0)
            wins.append(first + win)
            loses.append(first + lose)
            valid.append(there and own[win] > own[lose])
    return Chosen(np.array(wins), np.array(loses), np.array(valid, bool))


def majority(
    scores: Float[np.ndarray, "b experts"], weights: Sequence[float | int] | np.ndarray, *, group_size: int
) -> Float32[np.ndarray, " b"]:
    """A reward by votes: how many samples of its own group most experts place below it, less those placed above.

    r_i = Σ_j sign(Σ_k w_k sign(s_ik - s_jk))  (Copeland's rule). Scales do not matter, and no expert can outvote the
    rest by large numbers. NaN where an expert of a weight other than 0 gave no score.
    """
    weights = np.asarray(weights)
    counted = weights != 0
    votes, own_weights = scores[:, counted].astype(np.float64), weights[counted]
    rewards = np.full(len(scores), np.nan, np.float32)
    for first in range(0, len(scores), group_size):
        own = np.arange(first, min(first + group_size, len(scores)))
        own = own[np.isfinite(votes[own]).all(axis=1)]
        apart = np.sign(votes[own][:, None] - votes[own][None])
        rewards[own] = np.sign(apart @ own_weights).sum(axis=1)
    return rewards
