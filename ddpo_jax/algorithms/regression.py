"""Denoising regression on weighted latents: what supervised fine-tuning and reward-weighted regression share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax import losses
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.errors import UserError
from ddpo_jax.types import Frozen, Metrics, PyTree


class Weighted(NamedTuple):
    """Latents to regress on. What is on the devices may be longer than b, to be cut evenly."""

    cond: PyTree
    x_0: Float[Any, "b h w c"]
    weight: Float[Any, " b"]  # 0: nothing is learned from it


class Regression(NamedTuple):
    """Two of an Algorithm's functions."""

    loss: Any  # params, frozen, batch, rows, key -> (r,) losses, Metrics
    slices: Any  # batch -> (b, s) bool


def make_regression(parts: Parts, *, num_noise_draws: int, guided: bool = False) -> Regression:
    """Each latent is regressed on at `num_noise_draws` (t, ε) a pass.

    guided: regresses the guided output that is sampled from, not the network's own.

    Raises:
        UserError: num_noise_draws is not positive.
    """
    check_noise_draws(num_noise_draws)

    def loss(
        params: PyTree, frozen: Frozen, batch: Weighted, rows: Int[Array, "r 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " r"], Metrics]:
        sample = rows[:, 0]
        cond = jax.tree.map(lambda x: x[sample], batch.cond)
        uncond = frozen.uncond if guided else None
        error = parts.policy.denoising_error(params, batch.x_0[sample], cond, row_keys(key, rows), uncond)
        return losses.weighted_mse(error, batch.weight[sample])

    def slices(batch: Weighted) -> Bool[np.ndarray, "b s"]:
        return np.repeat(np.asarray(batch.weight)[:, None] > 0, num_noise_draws, axis=1)

    return Regression(loss, slices)


def check_noise_draws(num_noise_draws: int) -> None:
    """Raises UserError if it is not positive."""
    if num_noise_draws < 1:
        raise UserError(f"train.num_noise_draws={num_noise_draws}: expected 1 or more")


def row_keys(key: Key[Array, ""], rows: Int[Array, "r 2"]) -> Key[Array, " r"]:
    """A key a row, of its sample and slice alone."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1]))(rows)
