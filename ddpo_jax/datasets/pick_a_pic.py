"""Pick-a-Pic v2: parquet files of two pictures each row, and which of them somebody preferred."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpo_jax.datasets.formats import (
    BAD_LABEL,
    BAD_PICTURE,
    BAD_TEXT,
    NOT_READ,
    NOT_UTF8,
    TIE,
    UNLABELLED,
    BadRow,
    Preference,
    is_number,
)
from ddpo_jax.datasets.parquet import Rows, open_parquet, wanted_rows
from ddpo_jax.datasets.sources import Part, Source
from ddpo_jax.errors import UserError

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
READ = (*NEEDED, "label_1", "has_label")


def open_pick_a_pic(source: str) -> Source:
    """The comparisons of a parquet file, of those in a folder, or of those that a pattern such as DIR/train-* names.

    Filtered as Wallace et al. 2023 (Diffusion-DPO) published it: ties (label 0.5) and rows without a label are left
    out. label_0 = 1 means that jpg_0 was preferred.

    Raises:
        UserError: there is no such file, one is broken or lacks a column, or they are of several splits.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        paths = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        splits = sorted({found.name.partition("-")[0] for found in paths})
        if "train" in splits and len(splits) > 1:
            raise UserError(
                f"--input={source}: splits {', '.join(splits)}; give one, such as --input='{paths[0].parent}/train-*'"
            )
    else:
        paths = [path] if path.is_file() else sorted(Path(found) for found in glob.glob(str(path)))
    if not paths:
        raise UserError(f"--input={source}: no parquet file; expected a folder of them, a file or a pattern")
    return Source("preference", tuple(_part(found) for found in paths), parquet_rows, read_row)


def parquet_rows(path: Path, is_wanted: Callable, scratch: Path) -> Rows:
    """`wanted_rows` of a file of Pick-a-Pic."""
    with open_parquet(path) as file:
        columns = [name for name in READ if name in file.schema_arrow.names]
    return wanted_rows(path, is_wanted, scratch, columns=columns, pictures=["jpg_0", "jpg_1"])


def read_row(path: Path, row: dict[str, Any] | None, max_pixels: int) -> Preference:
    """The comparison of a row. Raises BadRow if it cannot be used, or is left out as published."""
    if row is None:
        raise BadRow(NOT_READ, "its row group is broken")
    label_0, label_1 = row["label_0"], row.get("label_1")
    if row.get("has_label") is False or row.get("has_label") == 0:
        raise BadRow(UNLABELLED)
    if label_0 == 0.5 and label_1 in (None, 0.5):
        raise BadRow(TIE)
    if not is_number(label_0) or label_0 not in (0, 1) or label_1 not in (None, 1 - label_0):
        raise BadRow(BAD_LABEL, f"label_0={label_0!r}, label_1={label_1!r}")
    if not isinstance(row["caption"], bytes):
        raise BadRow(BAD_TEXT, f"caption is {type(row['caption']).__name__}")
    try:
        prompt = row["caption"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(NOT_UTF8, f"caption: {error}") from None
    return Preference(prompt, _content(row["jpg_0"], "jpg_0"), _content(row["jpg_1"], "jpg_1"), float(label_0))


def _content(value: Any, name: str) -> bytes:
    if not isinstance(value, bytes) or not value:
        raise BadRow(BAD_PICTURE, f"{name} is empty")
    return value


def _part(path: Path) -> Part:
    try:
        with open_parquet(path) as file:
            absent = [name for name in NEEDED if name not in file.schema_arrow.names]
            num_rows = file.metadata.num_rows
        stat = path.stat()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise UserError(f"--input: {path}: not a parquet file that can be read ({error})") from None
    if absent:
        raise UserError(f"--input: {path}: no column {', '.join(absent)}; expected {', '.join(NEEDED)}")
    return Part(path, num_rows, f"{stat.st_size} bytes, {stat.st_mtime_ns}")
