"""Pictures and captions of a data set -> latents and conditions, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from ddpo_jax import multihost
from ddpo_jax.algorithms.parts import Parts, chunks, in_order
from ddpo_jax.errors import UserError
from ddpo_jax.policy import sample_keys
from ddpo_jax.sharding import local_rows
from ddpo_jax.types import Frozen, Posterior, PyTree, Recalled


def make_encoder(parts: Parts, *, prompt_dropout: float) -> Callable:
    """A function: frozen, images (b, n, H, W, 3), tokens (b, s), key -> cond, x_0 (b, n, h, w, c), on the devices.

    The n pictures of a sample share its caption; each latent is drawn from the encoder's distribution. They may be
    longer than b, to be cut evenly. Sample i depends on `key` and i alone.

    prompt_dropout: the fraction of samples whose caption is the empty one, for guidance.

    Raises:
        UserError: it is no fraction.
    """
    look, draw_all = _look(parts), _draw_all(parts, prompt_dropout)

    def encode_all(
        frozen: Frozen, images: UInt8[np.ndarray, "b n H W 3"], tokens: Int[Any, "b s"], key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, "filled n h w c"]]:
        return draw_all(frozen, lambda index: look(frozen, images[index]), tokens, key)

    return encode_all


def make_recalling_encoder(parts: Parts, *, prompt_dropout: float) -> Callable:
    """The same function of a Recalled for the images: only those that are missing are encoded, and then kept.

    On CPU the result is the same to the bit.
    """
    look, draw_all = _look(parts), _draw_all(parts, prompt_dropout)

    def encode_all(
        frozen: Frozen, recalled: Recalled, tokens: Int[Any, "b s"], key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, "filled n h w c"]]:
        num = recalled.posterior.mean.shape[1]
        missing = multihost.union(recalled.missing)  # another process may have found less
        images = multihost.together(lambda: recalled.images(missing))
        calls = chunks(len(missing), size=num * parts.chunk_size, num_shards=parts.layout.num_shards)
        with parts.phase("encode", len(missing)) as advance:
            for index in calls:
                real = index < len(missing)
                chosen = np.minimum(index, len(missing) - 1)
                by_sample = images[chosen].reshape(-1, num, *images.shape[1:])  # as in `make_encoder`: both round alike
                found = look(frozen, by_sample)
                _fill_in(recalled, missing[chosen], multihost.to_host(found))
                own = (num * local_rows(found.mean)[0][:, None] + np.arange(num)).ravel()
                _keep(recalled, missing[chosen[own[real[own]]]])
                advance(int(real.sum()))
        return draw_all(frozen, lambda index: jax.tree.map(lambda x: x[index], recalled.posterior), tokens, key)

    return encode_all


def _fill_in(recalled: Recalled, numbers: Int[np.ndarray, " k"], found: Posterior) -> None:
    """Writes what was found of these pictures, some of them twice, into the round's."""
    places = np.divmod(numbers, recalled.posterior.mean.shape[1])
    for kept, new in zip(recalled.posterior, found, strict=True):
        kept[places] = new.reshape(-1, *new.shape[2:])


def _keep(recalled: Recalled, numbers: Int[np.ndarray, " k"]) -> None:
    """Keeps what is filled in of these pictures."""
    places = np.divmod(numbers, recalled.posterior.mean.shape[1])
    multihost.together(lambda: recalled.keep(numbers, jax.tree.map(lambda x: x[places], recalled.posterior)))


def _look(parts: Parts) -> Callable:
    """The program: frozen, images (b, n, H, W, 3) -> what the encoder makes of them, a Posterior (b, n, h, w, c)."""
    layout = parts.layout

    @jax.jit
    def look(frozen: Frozen, images: UInt8[Array, "b n H W 3"]) -> Posterior:
        images = layout.rows(images)
        flat = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 255
        posterior = parts.model.encode(layout.gather(frozen.vae), flat)
        return layout.rows(jax.tree.map(lambda x: x.reshape(*images.shape[:2], *x.shape[1:]), posterior))

    return look


def _draw_all(parts: Parts, prompt_dropout: float) -> Callable:
    """A function: frozen, index -> Posterior (k, n, h, w, c) of these samples, tokens, key -> cond, x_0."""
    if not 0 <= prompt_dropout <= 1:
        raise UserError(f"data.prompt_dropout={prompt_dropout}: expected a fraction from 0 to 1; 0.1 is usual")
    layout = parts.layout

    @jax.jit
    def draw(
        frozen: Frozen, posterior: Posterior, tokens: Int[Array, "b s"], keys: Key[Array, " b"]
    ) -> tuple[PyTree, Float[Array, "filled n h w c"]]:
        posterior, tokens, keys = layout.rows((posterior, tokens, keys))
        key_drop, key_latent = jax.vmap(jax.random.split, out_axes=1)(keys)
        dropped = jax.vmap(lambda key: jax.random.uniform(key) < prompt_dropout)(key_drop)

        def drop(cond, uncond):
            return jnp.where(dropped.reshape(-1, *(1,) * (cond.ndim - 1)), uncond, cond)

        cond = jax.tree.map(drop, parts.model.encode_text(layout.gather(frozen.text), tokens), frozen.uncond)
        count, num = posterior.mean.shape[:2]
        own_keys = jax.vmap(lambda key: jax.random.split(key, num))(key_latent).reshape(-1)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]).astype(jnp.float32), posterior)
        x_0 = parts.model.sample_latent(flat, own_keys)
        return layout.rows((cond, x_0.reshape(count, num, *x_0.shape[1:])))

    def draw_all(
        frozen: Frozen, posterior: Callable, tokens: Int[Any, "b s"], key: Key[Array, ""]
    ) -> tuple[PyTree, Float[Array, "filled n h w c"]]:
        count, made = len(tokens), []
        calls = chunks(count, size=parts.chunk_size, num_shards=parts.layout.num_shards)
        with parts.phase("encode", count) as advance:
            for index in calls:
                chosen = np.minimum(index, count - 1)
                made.append(draw(frozen, posterior(chosen), np.asarray(tokens)[chosen], sample_keys(key, index)))
                jax.block_until_ready(made[-1])
                advance(int((index < count).sum()))
        return in_order(made, calls, count, layout)

    return draw_all
