"""Pictures and captions of a data set -> latents and conditions, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from ddpo_jax.algorithms.parts import Parts, chunks, in_order
from ddpo_jax.errors import UserError
from ddpo_jax.policy import sample_keys
from ddpo_jax.types import Frozen, PyTree


def make_encoder(parts: Parts, *, prompt_dropout: float) -> Callable:
    """A function: frozen, images (b, n, H, W, 3), tokens (b, s), key -> cond, x_0 (b, n, h, w, c), on the devices.

    The n pictures of a sample share its caption; each latent is drawn from the encoder's distribution. They may be
    longer than b, to be cut evenly. Sample i depends on `key` and i alone.

    prompt_dropout: the fraction of samples whose caption is the empty one, for guidance.

    Raises:
        UserError: it is no fraction.
    """
    if not 0 <= prompt_dropout <= 1:
        raise UserError(f"data.prompt_dropout={prompt_dropout}: expected a fraction from 0 to 1; 0.1 is usual")
    layout = parts.layout

    @jax.jit
    def encode(
        frozen: Frozen, images: UInt8[Array, "b n H W 3"], tokens: Int[Array, "b s"], keys: Key[Array, " b"]
    ) -> tuple[PyTree, Float[Array, "b n h w c"]]:
        images, tokens, keys = layout.rows((images, tokens, keys))
        key_drop, key_latent = jax.vmap(jax.random.split, out_axes=1)(keys)
        dropped = jax.vmap(lambda key: jax.random.uniform(key) < prompt_dropout)(key_drop)

        def drop(cond, uncond):
            return jnp.where(dropped.reshape(-1, *(1,) * (cond.ndim - 1)), uncond, cond)

        cond = jax.tree.map(drop, parts.model.encode_text(layout.gather(frozen.text), tokens), frozen.uncond)
        count, num = images.shape[:2]
        own_keys = jax.vmap(lambda key: jax.random.split(key, num))(key_latent).reshape(-1)
        flat = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 255
        x_0 = parts.model.encode(layout.gather(frozen.vae), flat, own_keys)
        return layout.rows((cond, x_0.reshape(count, num, *x_0.shape[1:])))

    def encode_all(
        frozen: Frozen, images: UInt8[np.ndarray, "b n H W 3"], tokens: Int[Any, "b s"], key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, "b n h w c"]]:
        count, made = len(images), []
        calls = chunks(count, size=parts.chunk_size, num_shards=layout.num_shards)
        with parts.phase("encode", count) as advance:
            for index in calls:
                chosen = np.minimum(index, count - 1)
                made.append(encode(frozen, images[chosen], np.asarray(tokens)[chosen], sample_keys(key, index)))
                jax.block_until_ready(made[-1])
                advance(int((index < count).sum()))
        return in_order(made, calls, count, layout)

    return encode_all
