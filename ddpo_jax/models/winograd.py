"""3x3 convolutions in fewer products, by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016).

Two results in a row of three taps each need 4 products and not 6: sums of the taps by sums of the four pixels under
them. Along both axes that is 16 for four pixels and a pair of channels, and not 36. The sums cost little beside the
products where there are many channels; they are of few terms, so that rounding is that of the plain convolution.

A map that is doubled first, every pixel standing for 2x2 equal ones, needs 9: one of the four sums is 0.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Real

from ddpo_jax.errors import UserError

METHODS = ("direct", "winograd")
CHANNELS = 64  # of input and output, at least: with fewer the sums take longer than the products that they save
WEIGHTS = 2**18  # of a tap, at most, on a map of fewer than PIXELS: of more, sums of taps are too much to read
PIXELS = 256
MAP = 2**22  # numbers in one picture's map, at most: the sums of its pixels are four times as many
KEPT = "convolution"  # the name by which `jax.checkpoint` knows the result


def choose_method(name: str) -> str:
    """How the denoiser's and the VAE's 3x3 convolutions are computed: `name`, or for "auto" the best on this machine.

    Raises:
        UserError: it is none of METHODS.
    """
    if name not in ("auto", *METHODS):
        raise UserError(f"convolution={name!r}: expected 'auto', {', '.join(map(repr, METHODS))}")
    if name != "auto":
        return name
    # An accelerator's library has kernels of its own, and chooses.
    return "winograd" if jax.default_backend() == "cpu" else "direct"


def suits(x: Float[Array, "b h w c"], kernel: Float[Array, "a a c f"]) -> bool:
    """Whether that pays; what the batch is makes no difference. Of a doubled map, x is what it is before."""
    channels, features = kernel.shape[2:]
    pixels = x.shape[1] * x.shape[2]
    return (
        kernel.shape[:2] == (3, 3)
        and x.dtype in (jnp.float32, jnp.float64)
        and min(channels, features) >= CHANNELS
        and (channels * features <= WEIGHTS or pixels >= PIXELS)
        and max(channels, features) * pixels <= MAP
    )


def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h w f"]:
    """The convolution padded by 1 on every side."""
    height, width = x.shape[1:3]
    even = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))) if height % 2 or width % 2 else x
    return checkpoint_name(_convolve(Plain, even, kernel)[:, :height, :width], KEPT)


def convolve_doubled(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b H W f"]:
    """The same of x with every pixel doubled in height and in width."""
    return checkpoint_name(_convolve(Doubled, x, kernel), KEPT)


class Plain:
    """The sums along one axis: as matrices, of taps, and of products for two results; of pixels, and back to them."""

    taps = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    results = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

    @staticmethod
    def tiles(padded: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], ...]:
        last = padded.shape[axis] - 3
        a, b, c, d = (jax.lax.slice_in_dim(padded, i, i + last, 2, axis) for i in range(4))
        return a - c, b + c, c - b, b - d

    @staticmethod
    def pixels(tiles: Float[Array, "n ..."], axis: int) -> Float[Array, "..."]:
        a, b, c, d = tiles
        return _in_turn(b - c + d - _moved(d, 1, axis), b + c - a + _moved(a, -1, axis), axis)


class Doubled:
    """The same, of a map whose every pixel stands for two."""

    taps = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]])
    results = np.array([[1, 1, 0], [0, 1, -1]])

    @staticmethod
    def tiles(padded: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], ...]:
        size = padded.shape[axis] - 2
        before, here, after = (jax.lax.slice_in_dim(padded, i, i + size, 1, axis) for i in range(3))
        return before - here, here, here - after

    @staticmethod
    def pixels(tiles: Float[Array, "n ..."], axis: int) -> Float[Array, "..."]:
        a, b, c = tiles
        return b - a + c + _moved(a, -1, axis) - _moved(c, 1, axis)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(kind: type, x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b H W f"]:
    """Its gradient takes the pixels' sums again: to keep them would be to keep four maps and not one, or nine."""
    tiles = _tiles(kind, x)
    products = jnp.einsum("rsnc,rscf->rsnf", _flat(tiles), _sums(kind.taps, kernel))
    return _results(kind, products.reshape(*tiles.shape[:-1], -1))


def _convolve_and_keep(kind, x, kernel):
    return _convolve(kind, x, kernel), (x, kernel)


def _gradient(kind, kept, gradient):
    x, kernel = kept
    taps, of_taps = jax.vjp(partial(_sums, kind.taps), kernel)
    tiles, products = _tiles(kind, x), _flat(_spread(kind, gradient))
    of_x = jnp.einsum("rsnf,rscf->rsnc", products, taps).reshape(tiles.shape)
    return kind.pixels(kind.pixels(of_x, 2), 2), *of_taps(jnp.einsum("rsnc,rsnf->rscf", _flat(tiles), products))


_convolve.defvjp(_convolve_and_keep, _gradient)


def _flat(tiles: Float[Array, "r s b h w c"]) -> Float[Array, "r s n c"]:
    return tiles.reshape(*tiles.shape[:2], -1, tiles.shape[-1])


def _tiles(kind: type, x: Float[Array, "b h w c"]) -> Float[Array, "r s b _ _ c"]:
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.stack(kind.tiles(padded, 2))
    return jnp.stack(kind.tiles(columns, 2))


def _results(kind: type, products: Float[Array, "r s b h w f"]) -> Float[Array, "b H W f"]:
    _, _, batch, height, width, features = products.shape
    pixels = _sums(kind.results, products).transpose(2, 3, 0, 4, 1, 5)
    return pixels.reshape(batch, 2 * height, 2 * width, features)


def _spread(kind: type, gradient: Float[Array, "b H W f"]) -> Float[Array, "r s b h w f"]:
    batch, height, width, features = gradient.shape
    pixels = gradient.reshape(batch, height // 2, 2, width // 2, 2, features)
    return _sums(kind.results.T, pixels.transpose(2, 4, 0, 1, 3, 5))


def _sums(weights: Real[np.ndarray, "n m"], terms: Float[Array, "m m ..."]) -> Float[Array, "n n ..."]:
    """Along both of the first axes, as one matrix product: in steps it is many operations, all to be compiled."""
    both = np.kron(weights, weights).astype(terms.dtype)
    sums = jnp.dot(both, terms.reshape(both.shape[1], -1), precision="highest")
    return sums.reshape(len(weights), len(weights), *terms.shape[2:])


def _in_turn(even: Float[Array, "..."], odd: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    shape = list(even.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _moved(x: Float[Array, "..."], step: int, axis: int) -> Float[Array, "..."]:
    """What was at i is at i + step, 1 or -1; at the end that is left, 0."""
    padded = jnp.pad(x, [(0, 0) if i != axis else (max(step, 0), max(-step, 0)) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(padded, max(-step, 0), max(-step, 0) + x.shape[axis], axis=axis)
