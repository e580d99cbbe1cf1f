"""Pictures of any kind as 8-bit RGB: upright, and over white where they are transparent."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddpo_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_THREADS = 16


def read_picture(picture: Path | bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The picture as 8-bit RGB, turned upright as its EXIF says, over white where it is transparent.

    picture: its file, or the file's content.

    Raises:
        UserError: it is broken, or of another kind than PNG, JPEG, WebP, BMP and TIFF.
    """
    with open_picture(picture) as file:
        return np.asarray(opaque(file))


def read_square(picture: Path | bytes, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """`read_picture`, cut to a centred square and resized to `resolution` pixels a side."""
    with open_picture(picture) as file:
        return np.asarray(square(file, resolution))


@contextmanager
def open_picture(picture: Path | bytes) -> Iterator[Image.Image]:
    """The picture with its header read, its pixels not yet. Failures inside, too, are UserErrors."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS) as file:
            yield file
    # Pillow raises SyntaxError where a PNG is broken, and names the file with its folder where it knows no format
    except Image.UnidentifiedImageError:
        raise UserError("not a picture of a known kind") from None
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot be read ({error})") from None


def opaque(file: Image.Image) -> Image.Image:
    """The opened picture in mode RGB, upright, over white. Raises ValueError if its pixels are not of 8 or 16 bits."""
    image, kind = ImageOps.exif_transpose(file), file.format
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # 16 bits, which Pillow would cut off
        return Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def square(file: Image.Image, resolution: int) -> Image.Image:
    """`opaque`, cut to a centred square and resized."""
    # A JPEG can be decoded at a half, a quarter or an eighth; twice what is wanted leaves the filter enough to work on.
    file.draft(None, (2 * resolution, 2 * resolution))
    return ImageOps.fit(opaque(file), (resolution, resolution), Image.Resampling.LANCZOS)


def nothing() -> None:
    """Does nothing."""


def watched(function: Callable, watch: Callable) -> Callable:
    """The function of one value, with watch() called before."""

    def call(value: Any) -> Any:
        watch()
        return function(value)

    return call


def in_threads(function: Callable, values: Sequence[Any]) -> list[Any]:
    """function(value) of each, in their order, on as many threads as there are processors."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        return list(pool.map(function, values))
