"""Rewards that are the size of the picture as a JPEG: nothing to download, and nothing to learn but the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image


def encode(picture: Float[np.ndarray, "H W 3"], *, quality: int) -> bytes:
    """The picture as a JPEG file.

    Pixels in [0, 1] are rounded to 8 bits, as in ddpo-pytorch; the original ddpo truncates them.
    """
    file = io.BytesIO()
    pixels = np.round(picture * 255).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def jpeg_kilobytes(images: Float[np.ndarray, "b H W 3"], *, quality: int = 95) -> Float[np.ndarray, " b"]:
    """Sizes of the pictures as JPEG files, in kilobytes of 1000 bytes.

    Quality 95 is that of ddpo-pytorch and of the original ddpo. Sizes compare only at one resolution.
    """
    return np.array([len(encode(picture, quality=quality)) / 1000 for picture in images])


def jpeg_incompressibility(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """JPEG size in kilobytes: higher for pictures with more detail or noise. The prompts are not read.

    Black et al. 2023 (DDPO), section 5.1.
    """
    return jpeg_kilobytes(images)


def jpeg_compressibility(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """Minus the JPEG size in kilobytes: higher for smoother pictures. The prompts are not read.

    Black et al. 2023 (DDPO), section 5.1.
    """
    return -jpeg_kilobytes(images)
