"""A small convolutional classifier of pictures."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.models.layers import conv
from ddpo_jax.models.norms import group_norm


class ConvNet(nn.Module):
    """Convolutions that each halve the picture, a mean over what is left of it, and one dense layer.

    features: the width of each convolution; every one a multiple of `num_groups`.
    """

    features: tuple[int, ...]
    num_groups: int
    num_classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b k"]:
        """The logits of pictures in [0, 1]."""
        x = 2.0 * images - 1.0
        for i, width in enumerate(self.features):
            x = conv(width, 3, jnp.float32, f"conv_{i}", stride=2)(x)
            x = nn.silu(group_norm(self.num_groups, 1e-5, jnp.float32, f"norm_{i}")(x))
        return nn.Dense(self.num_classes, name="classifier")(x.mean(axis=(1, 2)))
