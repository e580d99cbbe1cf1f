"""Captioned 64 px pictures of the 45 animals, each a pure function of its index."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ddpo_jax.data import with_article
from ddpo_jax.tiny.sprites import COLUMNS, EMOJI, SHEET, SIZE

RESOLUTION = 64
ANIMALS = tuple(EMOJI)
PROMPTS = tuple(with_article(animal) for animal in ANIMALS)  # the captions that name the animal alone
CAPTION = re.compile(rf"(?:an? )?({'|'.join(ANIMALS)})(?: (?:on|in) .+)?")

COLORS = {
    "red": (214, 64, 60), "orange": (240, 150, 50), "yellow": (247, 219, 88), "green": (96, 176, 92),
    "blue": (76, 128, 214), "purple": (146, 96, 186), "pink": (244, 168, 196), "brown": (142, 104, 72),
    "gray": (150, 152, 156), "white": (244, 244, 242), "black": (40, 40, 44),
}  # fmt: skip
PATTERNS = ("", "gradient", "striped", "dotted", "checkered")
PATTERN_SHARES = (0.5, 0.25, 0.1, 0.08, 0.07)


@lru_cache(maxsize=1)
def sprites() -> tuple[Image.Image, ...]:
    """One RGBA picture an animal, in the order of ANIMALS; colours premultiplied by alpha, for resizing."""
    sheet = Image.open(SHEET).convert("RGBa")
    boxes = [(i % COLUMNS * SIZE, i // COLUMNS * SIZE) for i in range(len(ANIMALS))]
    return tuple(sheet.crop((x, y, x + SIZE, y + SIZE)) for x, y in boxes)


class Placement(NamedTuple):
    """Where a sprite lies, in pixels."""

    size: int
    flipped: bool
    top: int
    left: int


def render(index: int) -> tuple[UInt8[np.ndarray, "64 64 3"], str]:
    """The picture and caption of an index, for any index >= 0: from 44 px up, anywhere, either way round."""
    return _captioned(index, _anywhere)


def portrait(index: int) -> tuple[UInt8[np.ndarray, "64 64 3"], str]:
    """The same, but large, within a pixel of the centre, and never flipped.

    A small network draws these sharply. With every place and both ways round it draws an average of them.
    """
    return _captioned(index, _centred)


def animal_of(caption: str) -> int | None:
    """The index in ANIMALS of the animal in `[a|an] ANIMAL [on ...|in ...]`; None if it is not of this form."""
    match = CAPTION.fullmatch(caption)
    return ANIMALS.index(match[1]) if match else None


def _captioned(
    index: int, choose: Callable[[np.random.Generator], Placement]
) -> tuple[UInt8[np.ndarray, "64 64 3"], str]:
    rng = np.random.default_rng(index)
    animal = int(rng.integers(len(ANIMALS)))
    color = rng.choice(list(COLORS))
    pattern = rng.choice(PATTERNS, p=PATTERN_SHARES)
    background = _background(rng, np.array(COLORS[color], np.float32), pattern)
    picture = _place(sprites()[animal], background, choose(rng))
    caption = with_article(ANIMALS[animal])
    if rng.random() < 0.5:
        kind = f"{color} {pattern}".strip()
        caption += f" on {with_article(kind)} background"
    return picture, caption


def _anywhere(rng: np.random.Generator) -> Placement:
    size = int(rng.integers(44, 61))
    flipped = bool(rng.random() < 0.5)
    return Placement(size, flipped, *rng.integers(0, RESOLUTION - size + 1, 2).tolist())


def _centred(rng: np.random.Generator) -> Placement:
    size = int(rng.integers(56, 61))
    margin = (RESOLUTION - size) // 2
    return Placement(size, False, *rng.integers(margin - 1, margin + 2, 2).tolist())


def _background(rng: np.random.Generator, color: Float[np.ndarray, "3"], pattern: str) -> Float[np.ndarray, "64 64 3"]:
    color = np.clip(color + rng.normal(0, 6, 3), 0, 255)
    other = np.clip(color + rng.choice([-1, 1]) * rng.uniform(25, 50), 0, 255)
    y, x = np.mgrid[0:RESOLUTION, 0:RESOLUTION] / RESOLUTION
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    wave = 2 * np.pi * rng.uniform(2, 4)  # 2 to 4 periods a picture: coarse enough for an 8-fold VAE
    phase = rng.uniform(0, 2 * np.pi)
    if pattern == "gradient":
        mix = (along - along.min()) / (along.max() - along.min())
    elif pattern == "striped":
        mix = _edge(np.sin(wave * along + phase))
    elif pattern == "dotted":
        mix = _edge(np.cos(wave * along + phase) + np.cos(wave * across) - 0.9)
    elif pattern == "checkered":
        mix = _edge(np.sin(wave * along + phase) * np.sin(wave * across))
    else:
        mix = np.zeros_like(x)
    return color + (other - color) * mix[..., None]


def _edge(wave: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """A soft threshold: about a pixel and a half of antialiasing."""
    return np.clip(0.5 + 2.0 * wave, 0, 1)


def _place(
    sprite: Image.Image, background: Float[np.ndarray, "64 64 3"], at: Placement
) -> UInt8[np.ndarray, "64 64 3"]:
    if at.flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = np.asarray(sprite.resize((at.size, at.size), Image.Resampling.BICUBIC), np.float32)
    picture = background.astype(np.float32)
    region = picture[at.top : at.top + at.size, at.left : at.left + at.size]
    region[:] = region * (1 - drawn[..., 3:] / 255) + drawn[..., :3]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
