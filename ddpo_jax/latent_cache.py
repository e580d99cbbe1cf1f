"""What a VAE's encoder makes of a data set's pictures, kept in a folder, for later passes and other runs to read.

A file holds one record a picture, at the place that its number says, and holes where none was written yet. A record
begins with a checksum of all of it, so that one that was cut off counts as none, whatever ended the run. Records of the
same picture are the same bytes: several runs and processes may write one folder.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.pictures import in_threads, nothing
from ddpo_jax.process import choose
from ddpo_jax.types import Posterior, Recalled

FORMAT = 1  # of records, and of how pictures are cut and scaled; to be raised with either
TOLD = "cache.json"  # what the records are of
FILES = ("pictures.bin", "flipped.bin")  # of pictures as they are, and turned over from left to right
CHECK = struct.Struct("<Q")
WRITTEN = 1 << 32  # beside the checksum, so that a hole never passes for a record
DTYPES = {"float32": np.float32, "float16": np.float16}


class Cache(NamedTuple):
    """Posteriors by a picture's number and by whether it is flipped."""

    read: Callable  # numbers (k,), flipped (k,), watch -> Posterior (k, h, w, c), whether each is there (k,)
    write: Callable  # numbers (k,), flipped (k,), Posterior -> None


def open_cache(name: str, *, identity: Mapping[str, Any], latent_shape: tuple[int, int, int], dtype: str) -> Cache:
    """The cache in a folder, which is made when the first record is written.

    identity: JSON values that tell what is kept in it from all else: the data set, the VAE.
    dtype: what is kept, "float32" or "float16".

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    folder = Path(name).expanduser()
    paths, kept = [folder / file for file in FILES], np.dtype(choose(DTYPES, dtype, "data.cache_dtype"))
    told = {**identity, "format": FORMAT, "shape of latents": list(latent_shape), "data.cache_dtype": dtype}
    _check(folder, told)
    shape = (2, *latent_shape)
    size = int(np.prod(shape)) * kept.itemsize
    length = CHECK.size + size

    def read(
        numbers: Int[np.ndarray, " k"], flipped: Bool[np.ndarray, " k"], watch: Callable = nothing
    ) -> tuple[Posterior, Bool[np.ndarray, " k"]]:
        found, there = np.zeros((len(numbers), *shape), kept), np.zeros(len(numbers), bool)

        def read_one(file: int, i: int) -> None:
            watch()
            number = int(numbers[i])
            record = os.pread(file, length, number * length)
            if len(record) == length and record == _record(record[CHECK.size :], number):
                found[i], there[i] = np.frombuffer(record, kept, offset=CHECK.size).reshape(shape), True

        try:
            for side, path in enumerate(paths):
                if path.is_file():
                    with path.open("rb") as file:
                        in_threads(partial(read_one, file.fileno()), np.flatnonzero(flipped == side).tolist())
        except OSError as error:
            raise RunStopped(f"data.cache={name!r}: cannot be read ({error.strerror})") from None
        return Posterior(found[:, 0], found[:, 1]), there

    def write(numbers: Int[np.ndarray, " k"], flipped: Bool[np.ndarray, " k"], posterior: Posterior) -> None:
        contents = np.stack(posterior, axis=1).astype(kept, copy=False)
        try:
            _begin(folder, told)
            for side, path in enumerate(paths):
                with _opened(path) as file:
                    for i in np.flatnonzero(flipped == side).tolist():
                        number = int(numbers[i])
                        _write_all(file, _record(contents[i].tobytes(), number), number * length)
        except OSError as error:
            raise RunStopped(f"data.cache={name!r}: cannot be written ({error.strerror})") from None

    return Cache(read, write)


def recall(
    cache: Cache,
    numbers: Int[np.ndarray, "b n"],
    flipped: Bool[np.ndarray, "b n"],
    read: Callable[[Sequence[int]], UInt8[np.ndarray, "k n H W 3"]],
    watch: Callable = nothing,
) -> Recalled:
    """What the cache has of a round's pictures, and the other ones themselves.

    read: numbers of samples of the round -> their pictures.
    watch: is called before each record is read, and may raise.
    """
    count, num = numbers.shape
    numbers, flipped = numbers.ravel(), flipped.ravel()
    posterior, there = cache.read(numbers, flipped, watch)
    missing = np.flatnonzero(~there)

    def decode(wanted: Int[np.ndarray, " m"]) -> UInt8[np.ndarray, "m H W 3"]:
        samples, places = np.unique(wanted // num, return_inverse=True)
        return read(samples.tolist())[places, wanted % num]

    decoded = decode(missing)

    def images(wanted: Int[np.ndarray, " m"]) -> UInt8[np.ndarray, "m H W 3"]:
        return decoded if np.array_equal(wanted, missing) else decode(wanted)

    return Recalled(
        Posterior(*(x.reshape(count, num, *x.shape[1:]) for x in posterior)),
        missing,
        images,
        lambda wanted, found: cache.write(numbers[wanted], flipped[wanted], found),
    )


def _record(content: bytes, number: int) -> bytes:
    """The content with its checksum before it, which is this number's alone."""
    return CHECK.pack(WRITTEN | zlib.crc32(content, number % WRITTEN)) + content


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, to be written at any place; what is in it stays."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, record: bytes, offset: int) -> None:
    while record:  # a disk that gets full takes a part
        done = os.pwrite(file, record, offset)
        record, offset = record[done:], offset + done


def _check(folder: Path, told: Mapping[str, Any]) -> None:
    """Raises UserError if the folder holds something else than what `told` tells, or cannot be written."""
    path = folder / TOLD
    nearest = next(entry for entry in (folder.absolute(), *folder.absolute().parents) if entry.exists())
    if path.is_file():
        differ = _differing(path, told)
        if differ:
            raise UserError(
                f"data.cache={str(folder)!r}: made with another {', another '.join(differ)}; give another folder, or"
                " delete this one"
            )
    elif folder.is_dir() and any(not entry.name.startswith(TOLD) for entry in folder.iterdir()):
        raise UserError(f"data.cache={str(folder)!r}: holds something else; give a new folder")
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"data.cache={str(folder)!r}: {nearest} cannot be written; give a folder of yours")


def _begin(folder: Path, told: Mapping[str, Any]) -> None:
    """Tells in the folder what it is of, if nothing did yet. Of several that begin at once all tell the same."""
    path = folder / TOLD
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{TOLD}.{uuid.uuid4().hex}"
        new.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        new.replace(path)
    if _differing(path, told):
        raise RunStopped(f"data.cache={str(folder)!r}: another run has begun to use it for other data; give another")


def _differing(path: Path, told: Mapping[str, Any]) -> list[str]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return sorted(name for name in told.keys() | before.keys() if before.get(name) != told.get(name))
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path}: cannot be read; delete the folder {path.parent}") from None
