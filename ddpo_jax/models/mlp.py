"""The head of LAION's aesthetic predictor and of ImageReward: linear layers over an embedding."""

from __future__ import annotations

import flax.linen as nn
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
