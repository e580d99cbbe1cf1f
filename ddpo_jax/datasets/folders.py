"""Folders and files of JSON lines with pictures beside them: comparisons, people's choices, captioned pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ddpo_jax.datasets.formats import (
    BAD_LABEL,
    BAD_LINE,
    TIE,
    BadRow,
    Captioned,
    Preference,
    checked_text,
    is_number,
)
from ddpo_jax.datasets.images import read_file
from ddpo_jax.datasets.sources import Source, json_part, json_rows, parse_line, picture_path
from ddpo_jax.errors import UserError

FROM_ONE = re.compile(rb'"choice"\s*:\s*"?2"?\s*[,}]')
PAIRS, METADATA = "pairs*.jsonl", "metadata.jsonl"
FIRST = ("0", "image_0", "first", "left", "a")
SECOND = ("1", "image_1", "second", "right", "b")
TIES = ("tie", "equal", "both", "neither", "none", "")


def open_pairs(source: str) -> Source:
    """Comparisons of a folder's pairs*.jsonl, as `preferences.open_source` reads them and as a run writes its own.

    Raises:
        UserError: there is none.
    """
    folder = Path(source).expanduser()
    files = sorted(folder.glob(PAIRS))
    if not files:
        raise UserError(f"--input={source}: {_found(folder)}; expected a folder with {PAIRS}")
    return Source("preference", tuple(json_part(path) for path in files), json_rows, read_pair)


def open_choices(source: str) -> Source:
    """People's choices, a JSONL file. A line has prompt, image_0 and image_1 (or images, a list of two), and choice.

    choice is which picture was chosen: 0 or 1, "image_0" or "image_1", "first" or "second", "left" or "right", "a" or
    "b", whatever the case, or the picture's name as the line has it. null, "", "tie", "equal", "both", "neither" and
    "none" are a tie, which is left out.

    Raises:
        UserError: there is no such file, or it numbers the pictures from 1, and every label would be the wrong one.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--input={source}: {_found(path)}; expected a JSONL file of choices")
    with path.open("rb") as lines:
        number = next((number for number, line in enumerate(lines, 1) if FROM_ONE.search(line)), None)
    if number:
        raise UserError(
            f"--input={source}: line {number} chooses picture 2; expected 0 for the first, 1 for the second"
        )
    return Source("preference", (json_part(path),), json_rows, read_choice)


def open_captioned(source: str) -> Source:
    """Captioned pictures of a folder with metadata.jsonl, as `image_text.open_source` reads them.

    Raises:
        UserError: there is none.
    """
    folder = Path(source).expanduser()
    if not (folder / METADATA).is_file():
        raise UserError(f"--input={source}: {_found(folder)}; expected a folder with {METADATA}")
    return Source("captioned", (json_part(folder / METADATA),), json_rows, read_caption)


def read_pair(path: Path, line: bytes | None, max_pixels: int) -> Preference | None:
    """The comparison of a line of pairs*.jsonl. Raises BadRow if it cannot be used."""
    row = parse_line(line)
    if row is None:
        return None
    prompt, label = checked_text(row.get("prompt"), "prompt"), row.get("label")
    if not is_number(label) or not 0 <= label <= 1:
        raise BadRow(BAD_LABEL, f"expected a number from 0 to 1, found {label!r:.80}")
    images = (read_file(picture_path(path, row, name), max_pixels) for name in ("image_0", "image_1"))
    return Preference(prompt, *images, float(label))


def read_choice(path: Path, line: bytes | None, max_pixels: int) -> Preference | None:
    """The comparison of a line of people's choices. Raises BadRow if it cannot be used, or is a tie."""
    row = parse_line(line)
    if row is None:
        return None
    if "images" in row:
        images = row["images"]
        if not isinstance(images, list) or len(images) != 2:
            raise BadRow(BAD_LINE, f"expected two pictures for images, found {images!r:.80}")
        row = row | {"image_0": images[0], "image_1": images[1]}
    prompt = checked_text(row.get("prompt"), "prompt")
    if "choice" not in row:
        raise BadRow(BAD_LABEL, "no choice")
    paths = [picture_path(path, row, name) for name in ("image_0", "image_1")]
    label = label_of(row["choice"], (row["image_0"], row["image_1"]))
    return Preference(prompt, *(read_file(found, max_pixels) for found in paths), label)


def label_of(choice: Any, names: tuple[str, str]) -> float:
    """1 if the first picture was chosen, 0 if the second. Raises BadRow for a tie, and for anything else."""
    if choice is None:
        raise BadRow(TIE)
    if is_number(choice) and choice in (0, 1):
        choice = str(int(choice))
    if isinstance(choice, str):
        if choice in names and names[0] != names[1]:
            return float(choice == names[0])
        word = choice.strip().casefold()
        if word in TIES:
            raise BadRow(TIE)
        if word in FIRST or word in SECOND:
            return float(word in FIRST)
    raise BadRow(BAD_LABEL, f"a choice that is none of those known: {choice!r:.80}")


def read_caption(path: Path, line: bytes | None, max_pixels: int) -> Captioned | None:
    """The picture and text of a line of metadata.jsonl. Raises BadRow if it cannot be used."""
    row = parse_line(line)
    if row is None:
        return None
    text = checked_text(row.get("text"), "text")
    return Captioned(read_file(picture_path(path, row, "file_name"), max_pixels), text)


def _found(path: Path) -> str:
    return "a folder without it" if path.is_dir() else "a file" if path.exists() else "no such file or folder"
