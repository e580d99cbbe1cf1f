"""The contract on pixels: float in [0, 1], or 8 bits, NHWC; anything else raises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num

from ddpo_jax.errors import UserError

PixelBatch = Num[Any, "b H W 3"]  # what a scorer is given: of JAX or numpy, float or uint8

# Decoders clip to [0, 1]; this much is rounding, while pictures in [-1, 1] or [0, 255] are far outside it.
TOLERANCE = 1e-3


def as_pixels(images: PixelBatch) -> Float[Array, "b H W 3"]:
    """The pictures as float in [0, 1]: 8 bits divided by 255 in float32, floats as they are.

    Where the values can be seen, outside a program that is being traced, they are looked at.

    Raises: UserError for other integers, and for floats outside [0, 1].
    """
    dtype = np.dtype(images.dtype)
    if dtype == np.uint8:
        return jnp.asarray(images, jnp.float32) / 255
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"pictures of {dtype} pixels: expected float in [0, 1], or uint8 in [0, 255]")
    if not isinstance(images, jax.core.Tracer) and images.size:
        check_range("a reward", float(jnp.nanmin(images)), float(jnp.nanmax(images)))
    return jnp.asarray(images)


def on_the_host(name: str, images: Num[np.ndarray, "b H W 3"]) -> Float32[np.ndarray, "b H W 3"]:
    """The same of pictures of the host, in float32. The array is a new one.

    Raises: UserError, which names the reward, as `as_pixels` does.
    """
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"reward {name} was given {images.dtype} pixels: expected float in [0, 1], or uint8 in [0, 255]"
        )
    images = images.astype(np.float32)
    if images.size:
        check_range(f"reward {name}", float(np.nanmin(images)), float(np.nanmax(images)))
    return images


def check_range(what: str, lowest: float, highest: float) -> None:
    """Raises UserError, which names what was given them, for pixels that are not in [0, 1]."""
    if lowest < -TOLERANCE or highest > 1 + TOLERANCE:
        raise UserError(
            f"{what} was given pixels from {lowest:g} to {highest:g}: pixels are float in"
            " [0, 1] everywhere. Map them once, where the pictures are made: (x + 1) / 2 from [-1, 1], x / 255 from 8"
            " bits."
        )
