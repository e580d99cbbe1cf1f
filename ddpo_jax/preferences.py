"""Pairs of pictures of one prompt, and which is preferred. A round's batch is a pure function of (seed, epoch)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from ddpo_jax.datasets.reading import is_prepared, open_prepared
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.image_text import identify, load_image, numbered_lines, read_rows, walk
from ddpo_jax.latent_cache import Cache, recall
from ddpo_jax.pairing import Chosen
from ddpo_jax.pictures import in_threads, nothing, open_picture, watched
from ddpo_jax.plugins import load_object
from ddpo_jax.types import Recalled
from ddpo_jax.workdir import replace_file, write_atomically

FILES = "pairs*.jsonl"
FLIPS = 2**31  # of the numbers that (seed, epoch, number) draws from; no pass of an update is it


class Pair(NamedTuple):
    """One comparison."""

    prompt: str
    image_0: UInt8[np.ndarray, "H W 3"]
    image_1: UInt8[np.ndarray, "H W 3"]
    label: float  # how surely image_0 is the better one: 1 is certain, 0 that image_1 is, 0.5 a tie


class Pairs(NamedTuple):
    """Comparisons by index."""

    get: Callable  # index -> Pair
    length: int | None  # None: any index
    told: Callable | None = None  # index -> prompt, label, without a look at the pictures; of a finite source
    identity: Callable | None = None  # () -> what tells the pictures and their order from others; of a finite source


class Drawn(NamedTuple):
    """Which comparisons are of a round."""

    indices: list[int]
    flipped: Bool[np.ndarray, "b 2"]  # pictures that are turned over, left to right


class Batch(NamedTuple):
    """A round of comparisons."""

    prompts: tuple[str, ...]
    images: UInt8[np.ndarray, "b 2 H W 3"]
    labels: Float32[np.ndarray, " b"]


class Remembered(NamedTuple):
    """A round of comparisons whose pictures, the preferred ones first, may have been encoded before."""

    prompts: tuple[str, ...]
    pictures: Recalled
    labels: Float32[np.ndarray, " b"]


def open_source(source: str, *, resolution: int) -> Pairs:
    """Pairs of a folder, of a prepared data set, or of a function of yours.

    A folder holds pairs.jsonl, or several files pairs*.jsonl that are read in the order of their names; a line is
    {"prompt": ..., "image_0": file, "image_1": file, "label": number}, the files relative to the folder. Its pictures,
    like those of a data set that ddpo_jax.prepare wrote, are turned upright, cut to a centred square and resized.
    `module:function` is called as function(index) -> (prompt, image_0, image_1, label), images (H, W, 3) uint8 of the
    right size, for any index from 0 to below 2^63.

    Raises:
        UserError: there is no such folder or function, or a line cannot be used.
    """
    folder = Path(source).expanduser()
    if ":" in source and not folder.exists():
        return Pairs(load_object(source), None)
    if is_prepared(folder):
        return _prepared(folder, resolution)
    files = sorted(folder.glob(FILES))
    if not files:
        found = "a folder without it" if folder.is_dir() else "no such folder"
        raise UserError(
            f"data.source={source!r}: {found}; expected a folder with pairs.jsonl, a prepared data set,"
            " or module:function"
        )
    rows = [_row(folder, f"{path}, line {number}", line) for path in files for number, line in numbered_lines(path)]
    if not rows:
        raise UserError(f"data.source={source!r}: its {FILES} hold no pair")

    def get(index: int) -> Pair:
        prompt, path_0, path_1, label = rows[index]
        return Pair(prompt, load_image(path_0, resolution), load_image(path_1, resolution), label)

    def told(index: int) -> tuple[str, float]:
        prompt, _, _, label = rows[index]
        return prompt, label

    return Pairs(get, len(rows), told, lambda: identify([path for row in rows for path in row[1:3]]))


def make_batch(
    source: Pairs,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    resolution: int,
    horizontal_flip: bool,
    watch: Callable = nothing,
) -> Batch:
    """A round's pairs, as `draw` says."""
    drawn = draw(source, batch_size=batch_size, seed=seed, epoch=epoch, horizontal_flip=horizontal_flip)
    return read_batch(source, drawn, resolution=resolution, watch=watch)


def draw(source: Pairs, *, batch_size: int, seed: int, epoch: int, horizontal_flip: bool) -> Drawn:
    """Which pairs are of a round. A finite source is walked in passes, each shuffled anew.

    horizontal_flip: turns each picture over, left to right, with a chance of one half.
    """
    indices = walk(source.length, batch_size=batch_size, seed=seed, epoch=epoch)
    flipped = np.random.default_rng((seed, epoch, FLIPS)).random((batch_size, 2)) < 0.5 * horizontal_flip
    return Drawn(indices, flipped)


def read_batch(source: Pairs, drawn: Drawn, *, resolution: int, watch: Callable = nothing) -> Batch:
    """These pairs.

    watch: is called before each is read, on any thread; what it raises ends the reading.
    """
    count = len(drawn.indices)
    images = np.empty((count, 2, resolution, resolution, 3), np.uint8)

    def read(i: int) -> tuple[str, float]:
        watch()
        pair = _checked(source.get(drawn.indices[i]), drawn.indices[i], resolution)
        for side, (image, over) in enumerate(zip((pair.image_0, pair.image_1), drawn.flipped[i], strict=True)):
            images[i, side] = image[:, ::-1] if over else image
        return pair.prompt, pair.label

    told = read_rows(read, source.length, count)
    return Batch(tuple(prompt for prompt, _ in told), images, np.array([label for _, label in told], np.float32))


def winner_first(batch: Batch) -> Batch:
    """The batch with the preferred picture of each pair first; its labels stay as they were."""
    loses = batch.labels < 0.5
    batch.images[loses] = batch.images[loses][:, ::-1]
    return batch


def recall_batch(
    source: Pairs,
    cache: Cache,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    resolution: int,
    horizontal_flip: bool,
    watch: Callable = nothing,
) -> Remembered:
    """`make_batch` of what a cache has of the pictures, the preferred ones first; the others are decoded."""
    drawn = draw(source, batch_size=batch_size, seed=seed, epoch=epoch, horizontal_flip=horizontal_flip)
    prompts, labels = zip(*in_threads(watched(source.told, watch), drawn.indices), strict=True)
    labels = np.array(labels, np.float32)
    sides = np.stack([labels < 0.5, labels >= 0.5], axis=1).astype(int)

    def read(samples: Sequence[int]) -> UInt8[np.ndarray, "k 2 H W 3"]:
        chosen = Drawn([drawn.indices[i] for i in samples], drawn.flipped[samples])
        return winner_first(read_batch(source, chosen, resolution=resolution, watch=watch)).images

    numbers = 2 * np.array(drawn.indices)[:, None] + sides
    flipped = np.take_along_axis(drawn.flipped, sides, axis=1)
    return Remembered(prompts, recall(cache, numbers, flipped, read, watch), labels)


def save_round(
    folder: Path,
    number: int,
    prompts: Sequence[str],
    images: UInt8[np.ndarray, "b H W 3"],
    scores: Float32[np.ndarray, "b experts"],
    chosen: Chosen,
) -> None:
    """Writes a round's pairs as pairs-NUMBER.jsonl with its pictures beside it, for `open_source`; last the lines.

    The winner is image_0 in every other line. Each line has the two pictures' scores too. The same round again replaces
    itself.

    Raises:
        RunStopped: the folder cannot be written, or a run begins where there are later rounds of another.
    """
    pairs = [
        pair if i % 2 == 0 else pair[::-1]
        for i, pair in enumerate(zip(chosen.win[chosen.valid], chosen.lose[chosen.valid], strict=True))
    ]
    rows = [
        {
            "prompt": prompts[pair[0]],
            **{f"image_{side}": f"{number:05d}-{sample:05d}.png" for side, sample in enumerate(pair)},
            "label": float(i % 2 == 0),
            "scores": [[float(s) if np.isfinite(s) else None for s in scores[sample]] for sample in pair],
        }
        for i, pair in enumerate(pairs)
    ]
    text, path = "".join(json.dumps(row) + "\n" for row in rows), folder / _lines_of(number)
    try:
        later = [other.name for other in folder.glob(FILES) if other.name > path.name]
        if number == 0 and later and not (path.is_file() and path.read_text() == text):
            raise RunStopped(f"dpo.save_pairs={folder}: {min(later)} in it is another run's; give an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        for pair, row in zip(pairs, rows, strict=True):
            for side, sample in enumerate(pair):
                buffer = io.BytesIO()
                Image.fromarray(images[sample]).save(buffer, "PNG")
                replace_file(folder / row[f"image_{side}"], buffer.getvalue())
        write_atomically(path, text)
    except OSError as error:
        raise RunStopped(f"dpo.save_pairs={folder}: cannot be written ({error.strerror})") from None


def _lines_of(number: int) -> str:
    return f"pairs-{number:05d}.jsonl"


def _prepared(folder: Path, resolution: int) -> Pairs:
    records = open_prepared(folder, "preference")

    def get(index: int) -> Pair:
        prompt, image_0, image_1, label = records.get(index)
        image_0, image_1 = (
            load_image(image, resolution, f"data.source, index {index}") for image in (image_0, image_1)
        )
        return Pair(prompt, image_0, image_1, label)

    def told(index: int) -> tuple[str, float]:
        record = records.get(index)
        return record.prompt, float(record.label)

    return Pairs(get, records.length, told, lambda: identify(records.files))


def _checked(pair: Any, index: int, resolution: int) -> Pair:
    try:
        pair = Pair(*pair)
    except TypeError:
        raise UserError(
            f"data.source, index {index}: expected (prompt, image_0, image_1, label), found {type(pair).__name__}"
        ) from None
    if not isinstance(pair.prompt, str):
        raise UserError(f"data.source, index {index}: expected a prompt, found {type(pair.prompt).__name__}")
    for image in (np.asarray(pair.image_0), np.asarray(pair.image_1)):
        # Not only the shape: floats in [0, 1], taken for 0 to 255, would train on black pictures without a word.
        if image.shape != (resolution, resolution, 3) or image.dtype != np.uint8:
            raise UserError(
                f"data.source, index {index}: expected uint8 images of shape ({resolution}, {resolution}, 3),"
                f" found {image.dtype} of shape {image.shape}"
            )
    if not 0 <= pair.label <= 1:
        raise UserError(f"data.source, index {index}: expected a label from 0 to 1, found {pair.label!r}")
    return pair


def _row(folder: Path, where: str, line: str) -> tuple[str, Path, Path, float]:
    try:
        row = json.loads(line)
        prompt, names, label = row["prompt"], (row["image_0"], row["image_1"]), float(row["label"])
        path_0, path_1 = (folder / name for name in names)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: expected prompt, image_0, image_1 and label in {line[:80]!r}") from None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: expected a string for prompt, found {prompt!r}")
    if not 0 <= label <= 1:
        raise UserError(f"{where}: expected a label from 0 to 1, found {row['label']!r}")
    for path, name in zip((path_0, path_1), names, strict=True):
        if not path.is_file():
            raise UserError(f"{where}: no such file {name!r}")
    return prompt, path_0, path_1, label


def shorter_side(source: str) -> int:
    """Pixels of the shorter side of the first picture: read at this resolution, it is only cut to a square.

    source: as in open_source.

    Raises:
        UserError: there is no such source, or the picture cannot be read.
    """
    pair = open_source(source, resolution=1).get(0)
    folder = Path(source).expanduser()
    if ":" in source and not folder.exists():
        try:
            return min(np.shape(pair[1])[:2])
        except (TypeError, ValueError, IndexError, KeyError):
            return 1  # whoever reads the pair tells what is wrong with it
    if is_prepared(folder):
        with open_picture(open_prepared(folder, "preference").get(0).image_0) as file:
            return min(file.size)
    lines = ((path, line) for path in sorted(folder.glob(FILES)) for _, line in numbered_lines(path))
    path, line = next(lines)
    with Image.open(_row(folder, str(path), line)[1]) as file:
        return min(file.size)
