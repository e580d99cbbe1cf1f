"""The pictures of prepared data sets: decoded once before they are kept, so that training meets none that is broken."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image

from ddpo_jax.datasets.formats import BAD_PICTURE, NO_FILE, OVERSIZED, BadRow
from ddpo_jax.datasets.jpeg import is_whole
from ddpo_jax.errors import UserError
from ddpo_jax.pictures import opaque, open_picture, square

MAX_PIXELS = 2**24  # 4096 x 4096: what takes 50 MB to decode
MAX_BYTES_PER_PIXEL = 8  # 16 bits for each of red, green, blue and alpha, not compressed
JPEG_QUALITY = 95
ORIENTATION, TURNED = 0x0112, range(2, 9)  # of EXIF


def read_file(path: Path, max_pixels: int) -> bytes:
    """The file's content. Raises BadRow if it is not there, or larger than any picture of so many pixels."""
    try:
        if not path.is_file():
            raise BadRow(NO_FILE, f"no such file {str(path)!r}")
        size = path.stat().st_size
        if size > MAX_BYTES_PER_PIXEL * max_pixels + 2**20:
            raise BadRow(OVERSIZED, f"{size} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise BadRow(NO_FILE, f"{str(path)!r}: {error}") from None


def prepare_image(content: bytes, *, max_pixels: int, resolution: int | None) -> bytes:
    """The picture as a JPEG or PNG file of 8-bit RGB, upright: as it is if it is one, as PNG if not.

    resolution: cuts to a centred square, resizes to so many pixels a side, and keeps that as a JPEG of quality 95.

    Raises:
        BadRow: it is broken, or has more than max_pixels.
    """
    try:
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the judge
            with open_picture(content) as file:
                return _prepared(file, content, complaints, max_pixels=max_pixels, resolution=resolution)
    except BadRow:
        raise
    except UserError as error:
        oversized = isinstance(error.__context__, Image.DecompressionBombError)
        raise BadRow(OVERSIZED if oversized else BAD_PICTURE, str(error)) from None
    except Exception as error:  # Pillow's readers of broken files raise what they stumble over, IndexError, say
        raise BadRow(BAD_PICTURE, f"{type(error).__name__}: {error}") from None


def _prepared(file: Image.Image, content: bytes, complaints: list, *, max_pixels: int, resolution: int | None) -> bytes:
    width, height = file.size
    if width * height > max_pixels:
        raise BadRow(OVERSIZED, f"{width} x {height} pixels")
    jpeg = file.format in ("JPEG", "MPO")
    if jpeg and not is_whole(content):
        raise BadRow(BAD_PICTURE, "a JPEG with bytes lost or changed")
    if resolution is not None:
        file.load()
        with open_picture(content) as again:  # for the scaled decoding, which a loaded picture is past
            return _encoded(square(again, resolution), "JPEG")
    file.load()
    plain = file.mode == "RGB" and not file.has_transparency_data and file.getexif().get(ORIENTATION) not in TURNED
    if (jpeg or file.format == "PNG") and plain and not complaints:  # which every reader would hear again
        return content
    return _encoded(opaque(file), "PNG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, kind, quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, kind)
    return buffer.getvalue()
