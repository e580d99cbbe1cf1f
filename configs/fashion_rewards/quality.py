"""Quality: traced by JAX, of the pictures alone. reward.name=device:configs.fashion_rewards.quality:product_photo"""

import jax.numpy as jnp


def product_photo(images):
    """images (b, H, W, 3) in [0, 1] -> (b,): how much more there is to see in the middle than in the margin.

    A photograph for a shop shows one garment, sharp, on a plain ground: the mean |∇| of the middle half of the sides,
    less that of what surrounds it.
    """
    down = jnp.abs(images[:, 1:, :-1] - images[:, :-1, :-1])
    right = jnp.abs(images[:, :-1, 1:] - images[:, :-1, :-1])
    detail = (down + right).mean(axis=-1)
    top, left = detail.shape[1] // 4, detail.shape[2] // 4
    inside = jnp.zeros(detail.shape[1:]).at[top : detail.shape[1] - top, left : detail.shape[2] - left].set(1)
    return detail.mean(axis=(1, 2), where=inside[None] > 0) - detail.mean(axis=(1, 2), where=inside[None] == 0)
