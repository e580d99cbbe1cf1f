"""Reward backpropagation: the gradient of the reward itself, through the decoder and the last denoising steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax import rewards
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.algorithms.regression import row_keys
from ddpo_jax.errors import UserError
from ddpo_jax.types import Algorithm, Frozen, Metrics, Prompts, PyTree


class Asked(NamedTuple):
    """A round's prompts; their pictures are drawn by the update itself."""

    tokens: Int[Any, "b s"]  # these two may be longer than b, to be cut evenly
    inputs: PyTree  # of the reward
    weight: Float[Any, " b"]


def reward_backprop(parts: Parts, *, num_steps: int, min_grad_steps: int, max_grad_steps: int) -> Algorithm:
    """L = -r(decode(x_0)), with the gradient through the last K denoising steps (Clark et al. 2024, DRaFT-K).

    K is drawn anew for each picture, from min_grad_steps to max_grad_steps, as in Prabhudesai et al. 2023 (AlignProp);
    0 teaches nothing from a picture. A picture is one query of the reward. Where `reward.shuffled` asks for a control,
    half of the pictures, by chance, teach the opposite.

    Raises:
        UserError: a reward that counts has no gradient, or the numbers of steps are out of range.
    """
    if parts.reward.pure is None:
        raise UserError(
            f"reward_backprop needs the reward's gradient, and {', '.join(parts.reward.names)} has none: a function on"
            " the host is no JAX program. Take rewards on the device (the README lists them; jpeg_compressibility has"
            " an _estimate), give the others a weight of 0 in reward.weights, or use algorithm=ddpo_is"
        )
    if not (0 <= min_grad_steps <= max_grad_steps <= num_steps and max_grad_steps):
        raise UserError(
            f"backprop.min_steps={min_grad_steps}, backprop.max_steps={max_grad_steps}: expected 0 <= min_steps <="
            f" max_steps, and 1 <= max_steps <= sample.num_steps={num_steps}"
        )
    model, policy, layout = parts.model, parts.policy, parts.layout

    placed = jax.jit(layout.rows)

    def collect(
        trainable: PyTree, frozen: Frozen, prompts: Prompts, carry: PyTree, key: Key[Array, ""]
    ) -> tuple[Asked, PyTree, dict[str, float | int]]:
        count = len(prompts.texts)
        filled = rewards.take(prompts, np.minimum(np.arange(count + -count % layout.num_shards), count - 1))
        tokens, inputs = placed((filled.tokens, parts.reward.prepare(filled)))
        return Asked(tokens, inputs, np.ones(count, np.float32)), carry, {}

    def loss(
        params: PyTree, frozen: Frozen, batch: Asked, rows: Int[Array, "r 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " r"], Metrics]:
        sample = rows[:, 0]
        key_steps, key_noise = jax.random.split(key)
        grad_steps = jax.vmap(lambda key: jax.random.randint(key, (), min_grad_steps, max_grad_steps + 1))(
            row_keys(key_steps, rows)
        )
        cond = layout.rows(model.encode_text(layout.gather(frozen.text), batch.tokens[sample]))
        x_0 = policy.final(params, cond, frozen.uncond, row_keys(key_noise, rows), grad_steps, max_grad_steps)
        images = jax.checkpoint(model.decode)(layout.gather(frozen.vae), x_0)
        inputs = jax.tree.map(lambda x: x[sample], batch.inputs)
        scores = jax.checkpoint(parts.reward.pure)(layout.gather(frozen.reward), images, inputs)
        reward = jnp.asarray(scores, jnp.float32)
        sign = either_way(jax.random.fold_in(key, 2), rows) if parts.shuffled else 1.0
        return -sign * reward, Metrics(mean={"reward/mean": reward}, max={})

    def slices(batch: Asked) -> Bool[np.ndarray, "b s"]:
        return np.ones((len(batch.weight), 1), bool)

    return Algorithm(
        init=lambda trainable: (),
        collect=collect,
        loss=loss,
        slices=slices,
        recompute=None,
        check=lambda first: None,
        stop=lambda scalars: None,
        reads_reference=False,
    )


def either_way(key: Key[Array, ""], rows: Int[Array, "r 2"]) -> Float[Array, " r"]:
    """1 or -1 for each row, by chance: where gradients have it for a factor, nothing can be learned from them.

    A reward's gradient may be much the same for all pictures, so that dealing it to the wrong ones would be no control.
    """
    return jax.vmap(lambda key: jax.random.rademacher(key, (), jnp.float32))(row_keys(key, rows))
