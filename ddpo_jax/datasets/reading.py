"""Prepared data sets by index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_jax.datasets.builder import INFO, PROGRESS, open_builder
from ddpo_jax.datasets.formats import IMAGES, KINDS, SPLIT, import_tfds, missing_extra
from ddpo_jax.errors import UserError


class Prepared(NamedTuple):
    """A data set's records by index. Any number of threads may read it."""

    get: Callable  # index -> Preference or Captioned
    length: int
    files: tuple[Path, ...]  # that hold them, in their order


def is_prepared(folder: Path) -> bool:
    """Whether the folder holds a prepared data set.

    Raises:
        UserError: it holds one that is not finished.
    """
    if (folder / PROGRESS).is_dir() and not (folder / INFO).is_file():
        raise UserError(f"data.source={str(folder)!r}: not finished; run the same ddpo_jax.prepare again")
    return (folder / INFO).is_file()


def open_prepared(folder: Path, kind: str) -> Prepared:
    """The data set in the folder.

    kind: "preference" or "captioned".

    Raises:
        UserError: it is of another kind, cannot be read, or a library is missing.
    """
    tfds = import_tfds()
    try:
        import grain
    except ImportError as error:
        raise missing_extra(error) from None
    builder = open_builder(folder, kind)
    files = tuple(map(Path, builder.info.splits[SPLIT].filepaths))
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise UserError(f"data.source={str(folder)!r}: {len(absent)} shards are not there, such as {absent[0]}")
    decoders = dict.fromkeys(IMAGES[kind], tfds.decode.SkipDecoding())
    records = grain.MapDataset.source(builder.as_data_source(split=SPLIT, decoders=decoders))
    record = KINDS[kind]

    def get(index: int) -> Any:
        try:
            fields = records[index]
        except RuntimeError as error:  # a checksum of array_record
            raise UserError(f"data.source={str(folder)!r}, index {index}: a broken shard ({error})") from None
        return record(**{name: _text(fields[name], name, kind) for name in record._fields})

    return Prepared(get, len(records), files)


def _text(value: Any, name: str, kind: str) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) and name not in IMAGES[kind] else value
