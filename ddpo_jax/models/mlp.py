"""Heads of reward models: that of LAION's aesthetic predictor and of ImageReward, and one that learns preferences."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.models.layers import Dtype

# Beside the widths that come out, the numbers under which torch's nn.Sequential has them: between are dropouts, which
# do nothing when one scores. There is no activation function.
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class ScoreMLP(nn.Module):
    """d-1024-128-64-16-1."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, " b"]:
        for i, width in LAYERS.items():
            x = nn.Dense(width, dtype=self.dtype, name=f"layers_{i}")(x)
        return x[:, 0]


class PreferenceHead(nn.Module):
    """A score of a picture and its prompt, linear in their `features` if there is no hidden layer."""

    hidden: tuple[int, ...] = ()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, picture: Float[Array, "b e"], text: Float[Array, "b d"]) -> Float[Array, " b"]:
        x = features(picture, text)
        for i, width in enumerate(self.hidden):
            x = nn.gelu(nn.Dense(width, dtype=self.dtype, name=f"layers_{i}")(x))
        # Zeros, so that at first all pictures are equal and the loss is log 2.
        last = nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=self.dtype, name=f"layers_{len(self.hidden)}")
        return last(x)[:, 0]


def features(picture: Float[Array, "b e"], text: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """[E_I, S, E_T, E_I ⊙ E_T, E_I · E_T]: what is linear in the last two is a bilinear form of picture and prompt.

    picture: [E_I, S], an embedding as wide as the text's, E_T, and whatever else is known of the picture.
    """
    product = picture[:, : text.shape[1]] * text
    return jnp.concatenate([picture, text, product, product.sum(axis=1, keepdims=True)], axis=1)
