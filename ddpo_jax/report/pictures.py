"""The report's pictures: cut out of the evaluations' grids, and small enough for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ddpo_jax import metrics

MAX_SIDE = 256  # pixels
TINY = 96  # up to here pixels matter: nothing is lost
MAX_PROMPTS = 12
MAX_FRAMES = 10


class Film(NamedTuple):
    """One prompt's picture at the same noise, at several evaluations."""

    text: str
    rewards: list[float | None]
    pictures: list[str]  # data URIs
    tiny: bool


def make_films(workdir: Path, name: str, rows: Sequence[dict]) -> tuple[list[int], list[Film]]:
    """The epochs of at most MAX_FRAMES evaluations, first and last among them, and the films of MAX_PROMPTS prompts.

    rows: the set's evaluations. Those whose grid is gone are left out.
    """
    rows = spread([row for row in rows if metrics.grid_path(workdir, name, row["epoch"]).exists()], MAX_FRAMES)
    if not rows:
        return [], []
    chosen = choose(rows[0]["texts"], MAX_PROMPTS)
    frames = []
    for row in rows:
        with Image.open(metrics.grid_path(workdir, name, row["epoch"])) as sheet:
            tiles = metrics.cut(sheet, len(row["texts"]))
        frames.append([tiles[i] for i in chosen])
    tiny = max(frames[0][0].size) <= TINY
    made = [
        Film(rows[0]["texts"][i], [row["rewards"][i] for row in rows], [data_uri(tile) for tile in tiles], tiny)
        for i, tiles in zip(chosen, zip(*frames, strict=True), strict=True)
    ]
    return [row["epoch"] for row in rows], made


def choose(texts: Sequence[str], count: int) -> list[int]:
    """Where the first picture of each of `count` prompts is, spread evenly over the prompts; not by how it looks."""
    return spread([i for i, text in enumerate(texts) if text not in texts[:i]], count)


def spread(items: list, count: int) -> list:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def data_uri(picture: Image.Image) -> str:
    """The picture inside a URI: a tiny one as it is, others at most MAX_SIDE pixels a side and compressed."""
    file = io.BytesIO()
    if max(picture.size) <= TINY:
        picture.save(file, format="PNG", optimize=True)
        kind = "png"
    else:
        small = picture.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        small.save(file, format="WEBP", quality=80)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
