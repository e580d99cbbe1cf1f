"""Shards as one data set of tensorflow-datasets: `tensorflow_datasets.builder_from_directory` opens the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpo_jax.datasets.formats import KINDS, SPLIT, VERSION, features, import_tfds
from ddpo_jax.errors import UserError

INFO = "dataset_info.json"
PROGRESS = "progress"  # the folder in it that tells what is done
SUFFIX = "array_record"


def shard_name(kind: str, shard: int, num_shards: int) -> str:
    """The name of a shard's file, as tensorflow-datasets wants it."""
    return f"{kind}-{SPLIT}.{SUFFIX}-{shard:05d}-of-{num_shards:05d}"


def write_info(folder: Path, kind: str, *, shard_lengths: list[int], num_bytes: int) -> None:
    """Writes the files that make a data set of the folder's shards."""
    tfds = import_tfds()
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=kind, split=SPLIT, filetype_suffix=SUFFIX)
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(kind),
        split_infos=[split],
        version=VERSION,
        description=(KINDS[kind].__doc__ or "").strip(),
        check_data=False,
    )


def open_builder(folder: Path, kind: str) -> Any:
    """The builder of a prepared data set of this kind.

    Raises:
        UserError: it is of another kind, cannot be read, or a library is missing.
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        name, length = builder.info.name, builder.info.splits[SPLIT].num_examples
    except Exception as error:  # of protobuf, tensorflow_datasets and the system: whatever the file's content leads to
        raise UserError(f"data.source={str(folder)!r}: not a data set that can be opened ({error})") from None
    if name != kind:
        raise UserError(
            f"data.source={str(folder)!r}: a data set of kind {name!r}; expected {kind!r}, with"
            f" {', '.join(KINDS[kind]._fields)}"
        )
    if builder.version != VERSION:
        raise UserError(
            f"data.source={str(folder)!r}: records of version {builder.version}; expected {VERSION}; prepare it anew"
        )
    if not length:
        raise UserError(f"data.source={str(folder)!r}: no record in it")
    return builder
