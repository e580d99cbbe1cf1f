"""Whether a JPEG lost or gained bytes on its way, which decoders do not tell: they fill up with grey, or stop early."""

from __future__ import annotations

import io
import re

from PIL import Image

# What may not stand in compressed data: 0xFF before anything but 0 (a byte 0xFF), 0xFF (filling) or a restart marker.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
BASELINE, PROGRESSIVE = (0xC0, 0xC1), 0xC2
START_OF_SCAN, END = 0xDA, 0xD9
BETWEEN_SCANS = {0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
SLACK = 8  # bytes that a decoder may look ahead
LAST = 16  # bytes, of which a picture that is whole needs some


def is_whole(content: bytes) -> bool:
    """Whether the compressed data are as long as the picture needs, neither shorter nor longer.

    Without its end marker but with a few bytes more, a picture that is whole still decodes, and one that lost bytes
    does not; without its last bytes, one that is whole does not decode, and one with bytes too many does. A change
    that leaves the length right is not found, nor, in a progressive JPEG, one in any but the last pass.
    """
    frame = _frame(content)
    if frame is None:
        return False
    kind, start, end = frame
    data = content[:end].rstrip(b"\x00\xff")  # some cameras fill up before the end marker
    if kind in BASELINE and not _decodes(content[:end] + bytes(SLACK)):
        return False
    return len(data) - LAST <= start or kind not in (*BASELINE, PROGRESSIVE) or not _decodes(data[:-LAST])


def _frame(content: bytes) -> tuple[int, int, int] | None:
    """The kind of JPEG, and where the last scan's data begin and end; None if its segments do not lead to the end."""
    position, kind, start = 2, 0, 0
    while position + 4 <= len(content) or content[position : position + 2] == bytes((0xFF, END)):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == END:
            return (kind, start, position) if start else None
        if start and marker not in BETWEEN_SCANS:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            kind = marker
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == START_OF_SCAN:
            found = MARKER.search(content, position)
            if not found:
                return None
            # A kind of several scans is checked by its last one.
            start, position = position, found.start()
    return None


def _decodes(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as file:
            file.draft(None, (1, 1))  # at an eighth: the compressed data are read all the same
            file.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
