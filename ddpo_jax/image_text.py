"""Captioned images. A round's batch is a pure function of (seed, epoch), so a resume needs no position."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ddpo_jax.datasets.reading import is_prepared, open_prepared
from ddpo_jax.errors import UserError
from ddpo_jax.latent_cache import Cache, recall
from ddpo_jax.pictures import in_threads, nothing, read_square, watched
from ddpo_jax.plugins import load_object
from ddpo_jax.types import Recalled

END = 4096  # bytes, of either end of a file
COMPRESSED = (".jpg", ".jpeg", ".png", ".webp")


class ImageText(NamedTuple):
    """Captioned images by index."""

    get: Callable  # index -> (H, W, 3) uint8, caption
    length: int | None  # None: any index
    caption: Callable | None = None  # index -> caption, without a look at the picture; of a finite source
    identity: Callable | None = None  # () -> what tells the pictures and their order from others; of a finite source


def open_source(source: str, *, resolution: int) -> ImageText:
    """Captioned images of a folder, of a prepared data set, or of a function of yours.

    A folder holds metadata.jsonl with `file_name` and `text` (Hugging Face's imagefolder layout); its images are
    turned upright, cut to a centred square and resized, as those of a data set that ddpo_jax.prepare wrote are.
    `module:function` is called as function(index) -> (H, W, 3) uint8, caption, for any index from 0 to below 2^63, and
    gives the right size itself.

    Raises:
        UserError: there is no such folder or function, or a line of metadata.jsonl cannot be used.
    """
    folder = Path(source).expanduser()
    if ":" in source and not folder.exists():
        return ImageText(load_object(source), None)
    if is_prepared(folder):
        return _prepared(folder, resolution)
    if not (folder / "metadata.jsonl").is_file():
        found = "a folder without it" if folder.is_dir() else "no such folder"
        raise UserError(
            f"data.source={source!r}: {found}; expected a folder with metadata.jsonl, a prepared data set,"
            " or module:function"
        )
    rows = [_metadata_row(folder, number, line) for number, line in numbered_lines(folder / "metadata.jsonl")]
    if not rows:
        raise UserError(f"data.source={source!r}: metadata.jsonl holds no image")

    def get(index: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        path, caption = rows[index]
        return load_image(path, resolution), caption

    return ImageText(get, len(rows), lambda index: rows[index][1], lambda: identify([path for path, _ in rows]))


def make_batch(
    source: ImageText, *, batch_size: int, seed: int, epoch: int, resolution: int, watch: Callable = nothing
) -> tuple[UInt8[np.ndarray, "b H W 3"], tuple[str, ...]]:
    """A round's images and captions. A finite source is walked in passes, each shuffled anew."""
    indices = walk(source.length, batch_size=batch_size, seed=seed, epoch=epoch)
    return read_batch(source, indices, resolution=resolution, watch=watch)


def read_batch(
    source: ImageText, indices: Sequence[int], *, resolution: int, watch: Callable = nothing
) -> tuple[UInt8[np.ndarray, "b H W 3"], tuple[str, ...]]:
    """The images and captions with these indices.

    watch: is called before each is read, on any thread; what it raises ends the reading.
    """
    images = np.empty((len(indices), resolution, resolution, 3), np.uint8)

    def read(i: int) -> str:
        watch()
        images[i], caption = _checked(source.get(indices[i]), indices[i], resolution)
        return caption

    return images, tuple(read_rows(read, source.length, len(indices)))


def recall_batch(
    source: ImageText,
    cache: Cache,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    resolution: int,
    watch: Callable = nothing,
) -> tuple[Recalled, tuple[str, ...]]:
    """`make_batch` of what a cache has of the pictures, each the only one of its sample; the others are decoded."""
    indices = walk(source.length, batch_size=batch_size, seed=seed, epoch=epoch)

    def read(samples: Sequence[int]) -> UInt8[np.ndarray, "k 1 H W 3"]:
        chosen = [indices[i] for i in samples]
        return read_batch(source, chosen, resolution=resolution, watch=watch)[0][:, None]

    numbers = np.array(indices)[:, None]
    recalled = recall(cache, numbers, np.zeros(numbers.shape, bool), read, watch)
    return recalled, tuple(in_threads(watched(source.caption, watch), indices))


def read_rows(read: Callable, length: int | None, batch_size: int) -> list[Any]:
    """read(i) of each row of a batch. What calls a function of the user's own stays on one thread."""
    return [read(i) for i in range(batch_size)] if length is None else in_threads(read, range(batch_size))


def identify(files: Sequence[Path]) -> str:
    """What tells these files, in this order, from others: all that is in them, of compressed ones the two ends.

    Names and times are left out, so that a copy is the same. What describes a compressed picture comes first in its
    file, and its end depends on all of its pixels.
    """

    def told(path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                if path.suffix.lower() not in COMPRESSED:
                    return hashlib.file_digest(file, "sha256").digest()
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                head = file.read(END)
                file.seek(max(0, size - END))
                return hashlib.sha256(size.to_bytes(8, "little") + head + file.read()).digest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    return hashlib.sha256(b"".join(in_threads(told, files))).hexdigest()


def walk(length: int | None, *, batch_size: int, seed: int, epoch: int) -> list[int]:
    """The indices of a round: of a finite source in passes, each shuffled anew, so that each is met once a pass."""
    first = epoch * batch_size
    if length is None:
        return [seed * 1_000_000_007 + first + i for i in range(batch_size)]
    places = [divmod(first + i, length) for i in range(batch_size)]
    orders = {number: np.random.default_rng((seed, number)).permutation(length) for number, _ in places}
    return [int(orders[number][position]) for number, position in places]


def load_image(picture: Path | bytes, resolution: int, where: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """`read_square`, whose errors name the file, or `where` it is."""
    try:
        return read_square(picture, resolution)
    except UserError as error:
        raise UserError(f"{where or picture}: not a picture that can be used: {error}") from None


def _prepared(folder: Path, resolution: int) -> ImageText:
    records = open_prepared(folder, "captioned")

    def caption(index: int) -> str:
        return records.get(index).text

    def get(index: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        record = records.get(index)
        return load_image(record.image, resolution, f"data.source, index {index}"), record.text

    return ImageText(get, records.length, caption, lambda: identify(records.files))


def _checked(pair: Any, index: int, resolution: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    try:
        image, caption = pair
    except (TypeError, ValueError):
        raise UserError(f"data.source, index {index}: expected (image, caption), found {type(pair).__name__}") from None
    if not isinstance(caption, str):
        raise UserError(f"data.source, index {index}: expected a caption, found {type(caption).__name__}")
    image = np.asarray(image)
    # Not only the shape: floats in [0, 1], taken for 0 to 255, would train on black pictures without a word.
    if image.shape != (resolution, resolution, 3) or image.dtype != np.uint8:
        raise UserError(
            f"data.source, index {index}: expected a uint8 image of shape ({resolution}, {resolution}, 3),"
            f" found {image.dtype} of shape {image.shape}"
        )
    return image, caption


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a .jsonl file that are not blank, with their numbers from 1. Raises UserError if it is not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _metadata_row(folder: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"{folder}/metadata.jsonl, line {number}"
    try:
        row = json.loads(line)
        path, caption = folder / row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: expected file_name and text in {line[:80]!r}") from None
    if not isinstance(caption, str):
        raise UserError(f"{where}: expected a string for text, found {caption!r}")
    if not path.is_file():
        raise UserError(f"{where}: no such file {row['file_name']!r}")
    return path, caption
