"""What is converted: files of rows, which are read from front to back and never held whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_jax.datasets.formats import BAD_LINE, NOT_UTF8, BadRow
from ddpo_jax.errors import UserError

MAX_LINE = 2**20  # bytes of a line of JSON


class Part(NamedTuple):
    """A file of the input."""

    path: Path
    num_rows: int
    identity: str  # another one for other content


class Source(NamedTuple):
    """An input. Its functions are of modules, so that another process can be told of them."""

    kind: str  # of the records
    parts: tuple[Part, ...]  # whose rows are numbered through
    rows: Callable  # path, is_wanted(first, count), scratch folder -> iterator of (row in the file, raw row) of those
    read: Callable  # path, raw row, max_pixels -> Preference or Captioned, pictures as found; None: nothing; or BadRow


def json_part(path: Path) -> Part:
    """A JSONL file's part; its rows are its lines, blank ones too.

    Raises:
        UserError: it cannot be read.
    """
    digest, num_rows = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.readline(MAX_LINE):
                digest.update(piece)
                num_rows += piece.endswith(b"\n")
            num_rows += file.tell() > 0 and not _ends_a_line(path)
    except OSError as error:
        raise UserError(f"--input={path}: cannot be read ({error.strerror})") from None
    return Part(path, num_rows, digest.hexdigest())


def json_rows(path: Path, is_wanted: Callable, scratch: Path) -> Iterator[tuple[int, bytes | None]]:
    """The wanted lines of a JSONL file; None for one that is too long to be held."""
    with path.open("rb") as file:
        row = 0
        while line := file.readline(MAX_LINE):
            whole = line.endswith(b"\n") or len(line) < MAX_LINE
            rest = line
            while not whole and rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE)
            if is_wanted(row, 1):
                yield row, (line.removeprefix(b"\xef\xbb\xbf") if not row else line) if whole else None
            row += 1


def parse_line(line: bytes | None) -> dict[str, Any] | None:
    """The line's JSON object; None for a blank line.

    Raises:
        BadRow: it is none.
    """
    if line is None:
        raise BadRow(BAD_LINE, f"longer than {MAX_LINE} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(NOT_UTF8, str(error)) from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(BAD_LINE, f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(BAD_LINE, f"expected an object, found {type(row).__name__}")
    return row


def picture_path(path: Path, row: dict[str, Any], name: str) -> Path:
    """The file that a row names under `name`, relative to the JSONL file's folder. Raises BadRow if it names none."""
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise BadRow(BAD_LINE, f"expected a file's name for {name}, found {value!r:.80}")
    return path.parent / value


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
