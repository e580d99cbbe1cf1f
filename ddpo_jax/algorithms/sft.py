"""Supervised fine-tuning: denoising regression on captioned images (Ho et al. 2020; Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax import losses
from ddpo_jax.algorithms.parts import Parts, chunks, in_order
from ddpo_jax.errors import UserError
from ddpo_jax.policy import sample_keys
from ddpo_jax.types import Algorithm, Frozen, Metrics, Prompts, PyTree


class Weighted(NamedTuple):
    """Latents to regress on."""

    cond: PyTree
    x_0: Float[Any, "b h w c"]
    weight: Float[Any, " b"]


def sft(parts: Parts, *, prompt_dropout: float, num_noise_draws: int) -> Algorithm:
    """Denoising regression. Each picture is encoded once a round and regressed on at `num_noise_draws` (t, ε).

    prompt_dropout: the fraction of pictures that train the unconditional branch, for guidance.
    """
    if not 0 <= prompt_dropout <= 1:
        raise UserError(f"data.prompt_dropout={prompt_dropout}: expected a fraction from 0 to 1; 0.1 is usual")
    if num_noise_draws < 1:
        raise UserError(f"data.num_noise_draws={num_noise_draws}: expected 1 or more")

    layout = parts.layout

    @jax.jit
    def encode(
        frozen: Frozen, images: Float[Array, "b H W 3"], tokens: Int[Array, "b s"], keys: Key[Array, " b"]
    ) -> tuple[PyTree, Float[Array, "b h w c"]]:
        images, tokens, keys = layout.rows((images, tokens, keys))
        key_drop, key_latent = jax.vmap(jax.random.split, out_axes=1)(keys)
        dropped = jax.vmap(lambda key: jax.random.uniform(key) < prompt_dropout)(key_drop)

        def drop(cond, uncond):
            return jnp.where(dropped.reshape(-1, *(1,) * (cond.ndim - 1)), uncond, cond)

        cond = jax.tree.map(drop, parts.model.encode_text(layout.gather(frozen.text), tokens), frozen.uncond)
        return layout.rows((cond, parts.model.encode(layout.gather(frozen.vae), images, key_latent)))

    def collect(
        trainable: PyTree,
        frozen: Frozen,
        inputs: tuple[Float[np.ndarray, "b H W 3"], Prompts],
        carry: PyTree,
        key: Key[Array, ""],
    ) -> tuple[Weighted, PyTree, dict[str, float | int]]:
        images, prompts = inputs
        calls, made = chunks(len(images), size=parts.chunk_size, num_shards=layout.num_shards), []
        with parts.phase("encode", len(images)) as advance:
            for index in calls:
                chosen = np.minimum(index, len(images) - 1)
                tokens = np.asarray(prompts.tokens)[chosen]
                made.append(encode(frozen, images[chosen], tokens, sample_keys(key, index)))
                jax.block_until_ready(made[-1])
                advance(int((index < len(images)).sum()))
        cond, x_0 = in_order(made, calls, len(images), layout)
        report = {"captions/cut": float(sum(entry["cut"] for entry in prompts.metadata))}
        return Weighted(cond, x_0, np.ones(len(images), np.float32)), carry, report

    def loss(
        params: PyTree, frozen: Frozen, batch: Weighted, rows: Int[Array, "r 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " r"], Metrics]:
        sample = rows[:, 0]
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1]))(rows)
        cond = jax.tree.map(lambda x: x[sample], batch.cond)
        error = parts.policy.denoising_error(params, batch.x_0[sample], cond, keys)
        return losses.weighted_mse(error, batch.weight[sample])

    def slices(batch: Weighted) -> Bool[np.ndarray, "b s"]:
        return np.ones((len(batch.weight), num_noise_draws), bool)

    return Algorithm(
        init=lambda: (),
        collect=collect,
        loss=loss,
        slices=slices,
        recompute=None,
        check=lambda first: None,
        stop=lambda scalars: None,
        reads_reference=False,
    )
