"""Pictures of a folder, of any size, with their prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ddpo_jax.errors import UserError
from ddpo_jax.pictures import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
SHEET = "grid.png"  # of all pictures, which ddpo_jax.sample writes beside them


class Entry(NamedTuple):
    """A picture's file, and what is known of it."""

    path: Path
    text: str  # the prompt
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name as text, whatever bytes it is made of."""
        return os.fsencode(self.path.name).decode("utf-8", "replace")


class Listing(NamedTuple):
    """What a folder holds."""

    entries: tuple[Entry, ...]  # by file name
    absent: tuple[str, ...]  # files that metadata.jsonl names and that are not there


def list_pictures(folder: Path, prompt: str | None = None) -> Listing:
    """The folder's PNG, JPEG, WebP, BMP and TIFF files, by name; folders in it are not looked into.

    Prompts are `text` of metadata.jsonl in it, whose other keys but file_name become the metadata, or "".

    prompt: one for all, in place of those.

    Raises:
        UserError: there is no such folder, no picture in it, or a line of metadata.jsonl cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"--images={folder}: {'no folder' if folder.exists() else 'no such folder'}")
    rows = read_metadata(folder / METADATA) if (folder / METADATA).is_file() else {}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if rows and SHEET not in rows:
        paths = [path for path in paths if path.name != SHEET]
    if not paths:
        raise UserError(f"--images={folder}: no picture in it; expected files that end in {', '.join(SUFFIXES)}")
    known = [rows.get(path.name, {}) for path in paths]
    entries = tuple(
        Entry(
            path,
            row.get("text", "") if prompt is None else prompt,
            {name: value for name, value in row.items() if name not in ("file_name", "text")},
        )
        for path, row in zip(paths, known, strict=True)
    )
    return Listing(entries, tuple(name for name in rows if not (folder / name).is_file()))


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a metadata.jsonl by file name; of several of one name the last.

    Raises:
        UserError: it is not UTF-8, or a line has no file_name or another thing than a string for text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    return dict(_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())


def read_all(entries: tuple[Entry, ...]) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"] | None, str]]:
    """(position, picture, "") of each that can be read, (position, None, the reason) of the others."""
    for i, entry in enumerate(entries):
        try:
            yield i, read_picture(entry.path), ""
        except UserError as error:
            yield i, None, str(error)


def _row(where: str, line: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
        name, text = str(Path(row["file_name"])), row.get("text", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: expected file_name and text in {line[:80]!r}") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a string for text, found {text!r}")
    return name, row
