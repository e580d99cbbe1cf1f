"""An estimate of the size of a picture as a JPEG file that JAX can trace and differentiate.

The coefficients are those of the file before they are rounded (ITU-T T.81, 1992: the DCT of A.3.3 and quantisation of
A.3.4, with the tables of K.1 scaled by libjpeg's rule); the bits that they take are a smooth function of them in
place of the Huffman codes of F.1.2 and K.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpo_jax.errors import UserError
from ddpo_jax.rewards.pixels import PixelBatch, as_pixels
from ddpo_jax.types import PyTree

# T.81, K.1: rows are vertical frequencies.
LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# JFIF 1.02: R, G, B -> Y, Cb, Cr, the latter two about 0
YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ]
)

# What a file holds besides the codes: markers, both quantisation tables, the four standard Huffman tables.
HEADER_BYTES = 625

# T.81, K.3: the code of "no more coefficients in this block", luma then chroma, and that of a DC difference of 0.
END_BITS = (4, 2)
DC_ZERO_BITS = 2

# By least squares (see `jpeg_kilobytes_estimate`): a, b, c
BITS = (2.16, 2.98, 1.59)

# n, how sharply a coefficient becomes non-zero as it passes 1/2; and the variance of pixels rounded to integers.
SHARPNESS = 4
ROUNDING_VARIANCE = 1 / 12

_DCT = np.sqrt(np.where(np.arange(8) == 0, 1, 2) / 8)[:, None] * np.cos(
    np.pi / 16 * np.outer(np.arange(8), 2 * np.arange(8) + 1)
)
# T.81, figure 5: diagonal after diagonal, the odd ones downwards
_ZIGZAG = np.array(
    [8 * u + v for u, v in sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))],
    np.int32,
)


def jpeg_kilobytes_estimate(images: Float[Array, "b H W 3"], *, quality: int = 95) -> Float[Array, " b"]:
    """About what `jpeg.jpeg_kilobytes` returns, in kilobytes of 1000 bytes, but smooth in the pictures.

    kB = (625 + bits / 8) / 1000,  bits = Σ_AC (a p s + b p log2(1 + r)) + Σ_DC (2 + c p s) + Σ_blocks (1 - p_63) e
    p = σ(n ln 4(q² + 1 / (12 Q²))),  s = log2(|q| + 1/2) + 1/2,  r_{k+1} = (1 - p_k) (r_k + 1),  r_1 = 0

    q: a coefficient over its step Q in the quantisation table, not rounded; of DC, the difference to the block before.
    p: a soft indicator of q ≠ 0.  s: a soft magnitude category (T.81, F.1.2).  r: the expected run of zeros before q
    in zigzag order.  e: the code that ends a block.

    BITS = a, b, c are least squares of the relative error of 1488 sizes: 496 pictures of 33x50 to 128x128 pixels, of
    the kinds in tests/test_jpeg_estimate.py, at quality 50, 80 and 95. On the 500 others of that test the relative
    error is 0.8 % in the median and 3.1 % at the 95th percentile at quality 95 (0.7 % and 2.0 % at 80), and Spearman's
    correlation 0.9997, and 0.999 or more within each size. Not known to it: what rounding to integers adds to smooth
    pictures where steps are fine. Plain gradients of colour of 256 pixels and more come out about 15 % small at 95, and
    above 95 all smooth pictures do, by half at 100 at the worst; flat ones come out 16 % large at 100.

    images: in [0, 1], in float32 or float64, which the sizes have as well; half precision is computed in float32.
    They are not rounded to 8 bits.  quality: from 1 to 100, as Pillow's.

    Raises: UserError if quality is outside 1 to 100.
    """
    bits, fixed_bits = bit_counts(images, quality=quality)
    total = bits @ jnp.asarray(BITS, bits.dtype) + fixed_bits
    return (HEADER_BYTES + total / 8) / 1000


def pure_incompressibility(params: PyTree, images: PixelBatch, inputs: PyTree) -> Float[Array, " b"]:
    """The estimated JPEG size in kilobytes, as `on_device` wants it; params and inputs are empty, and not read.

    The differentiable twin of `jpeg.jpeg_incompressibility`.
    """
    return jpeg_kilobytes_estimate(as_pixels(images))


def pure_compressibility(params: PyTree, images: PixelBatch, inputs: PyTree) -> Float[Array, " b"]:
    """Minus the estimated JPEG size in kilobytes, as `on_device` wants it; params and inputs are empty, and not read.

    The differentiable twin of `jpeg.jpeg_compressibility`.
    """
    return -jpeg_kilobytes_estimate(as_pixels(images))


def bit_counts(images: Float[Array, "b H W 3"], *, quality: int) -> tuple[Float[Array, "b 3"], Float[Array, " b"]]:
    """What `BITS` are multiplied by, and the bits that are known without a fit: together all but the header.

    Σ_AC p s, Σ_AC p log2(1 + r) and Σ_DC p s; then the ends of blocks and the DC codes of 0.
    """
    counts, known = 0, 0
    planes = quantised(images, quality=quality)
    for q, table, order, end_bits in zip(
        planes, quantisation_tables(quality), (_luma_order, _row_order), END_BITS, strict=True
    ):
        variance = jnp.asarray(ROUNDING_VARIANCE / table.ravel()[_ZIGZAG] ** 2, q.dtype)
        dc = order(q[..., 0, 0])
        difference = jnp.diff(dc, axis=-1, prepend=0)
        dc_category = nonzero(difference, variance[0]) * category(difference)

        b, num_planes, y, x = q.shape[:4]
        ac = jnp.moveaxis(q.reshape(b, num_planes, y * x, 64)[..., _ZIGZAG[1:]], -1, 0)
        present = nonzero(ac, variance[1:, None, None, None])
        ac_category = present * category(ac)
        run = present * jnp.log2(1 + runs(present))

        counts += jnp.stack(
            [ac_category.sum(axis=(0, 2, 3)), run.sum(axis=(0, 2, 3)), dc_category.sum(axis=(1, 2))], axis=1
        )
        num_blocks = dc.shape[-1]
        ends = (1 - present[-1]).sum(axis=(1, 2)) + num_planes * (num_blocks - y * x)  # fillers are empty
        known += end_bits * ends + DC_ZERO_BITS * num_planes * num_blocks
    return counts, known


def quantisation_tables(quality: int) -> tuple[Int[np.ndarray, "8 8"], Int[np.ndarray, "8 8"]]:
    """The steps for luma and chroma, by libjpeg's rule: floor((table · scale + 50) / 100) within 1 to 255.

    scale = floor(5000 / quality) below 50, 200 - 2 quality from there on.

    Raises: UserError if quality is outside 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality}: expected 1 to 100")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (np.clip((table * scale + 50) // 100, 1, 255) for table in (LUMA, CHROMA))
    return luma, chroma


def quantised(
    images: Float[Array, "b H W 3"], *, quality: int
) -> tuple[Float[Array, "b 1 y x 8 8"], Float[Array, "b 2 y_chroma x_chroma 8 8"]]:
    """DCT coefficients of luma and of both chromas in units of their quantisation steps, not rounded.

    The picture is continued by its edge to whole blocks; chroma is the mean of 2x2 pixels. Axes: picture, plane, block
    row, block column, vertical frequency, horizontal frequency.
    """
    b, H, W, _ = images.shape
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    images = jnp.pad(images, ((0, 0), (0, -H % 16), (0, -W % 16), (0, 0)), mode="edge")
    planes = jnp.einsum("bijd,cd->bcij", 255 * images, jnp.asarray(YCBCR, images.dtype), precision="highest")
    _, _, height, width = planes.shape
    chroma = planes[:, 1:].reshape(b, 2, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    luma = planes[:, :1, : H + -H % 8, : W + -W % 8] - 128
    steps = (jnp.asarray(table, images.dtype) for table in quantisation_tables(quality))
    luma, chroma = (
        dct(plane) / step[None, None, None, None] for plane, step in zip((luma, chroma), steps, strict=True)
    )
    return luma, chroma


def dct(planes: Float[Array, "b p H W"]) -> Float[Array, "b p y x 8 8"]:
    """The orthonormal two-dimensional DCT-II of each block of 8x8 pixels (T.81, A.3.3); H and W in whole blocks."""
    b, p, H, W = planes.shape
    basis = jnp.asarray(_DCT, planes.dtype)
    blocks = planes.reshape(b, p, H // 8, 8, W // 8, 8)
    return jnp.einsum("ui,bpyixj,vj->bpyxuv", basis, blocks, basis, precision="highest")


def nonzero(q: Float[Array, "*n"], variance: Float[Array, "*m"]) -> Float[Array, "*n"]:
    """p = σ(n ln 4(q² + v)): about 0 below |q| = 1/2, where q rounds to 0, about 1 above. v: that of rounding."""
    return jax.nn.sigmoid(SHARPNESS * jnp.log(4 * (q**2 + variance)))


def category(q: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """s = log2(|q| + 1/2) + 1/2: a smooth course through the number of bits of |q| rounded (T.81, F.1.2)."""
    return jnp.log2(jnp.sqrt(q**2 + 1e-3) + 0.5) + 0.5


def runs(present: Float[Array, "k b p n"]) -> Float[Array, "k b p n"]:
    """The expected number of zeros just before each coefficient, if it is non-zero with the probability `present`."""

    def step(
        run: Float[Array, "b p n"], present: Float[Array, "b p n"]
    ) -> tuple[Float[Array, "b p n"], Float[Array, "b p n"]]:
        return (1 - present) * (run + 1), run

    return jax.lax.scan(step, jnp.zeros_like(present[0]), present)[1]


def _luma_order(dc: Float[Array, "b p y x"]) -> Float[Array, "b p n"]:
    """Blocks in the order of the file: 2x2 of them beside each pair of chroma blocks; the edge fills up what lacks."""
    dc = jnp.pad(dc, ((0, 0), (0, 0), (0, dc.shape[2] % 2), (0, dc.shape[3] % 2)), mode="edge")
    b, p, y, x = dc.shape
    return dc.reshape(b, p, y // 2, 2, x // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(b, p, y * x)


def _row_order(dc: Float[Array, "b p y x"]) -> Float[Array, "b p n"]:
    """Blocks in the order of the file where there is one of a plane at a time: row by row."""
    b, p, y, x = dc.shape
    return dc.reshape(b, p, y * x)
