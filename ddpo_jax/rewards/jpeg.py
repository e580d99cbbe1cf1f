"""Rewards that are the size of the picture as a JPEG: nothing to download, and nothing to learn but the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image


def jpeg_kilobytes(images: Float[np.ndarray, "b H W 3"], *, quality: int = 95) -> Float[np.ndarray, " b"]:
    """Sizes of the pictures as JPEG files, in kilobytes of 1000 bytes.

    Pixels in [0, 1] are rounded to 8 bits, as in ddpo-pytorch; the original ddpo truncates them.
    Quality 95 is that of both. Sizes compare only at one resolution.
    """
    pixels = np.round(images * 255).clip(0, 255).astype(np.uint8)
    return np.array([_num_bytes(picture, quality) / 1000 for picture in pixels])


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


def _num_bytes(picture: np.ndarray, quality: int) -> int:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return file.tell()
