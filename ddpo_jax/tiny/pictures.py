"""The pictures of the embedded model's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

FACTOR = 2  # by which a picture is enlarged
MARGIN = 4  # pixels, white

Rows = Sequence[Mapping[str, Any]]


def sheet(pictures: Float[np.ndarray, "n H W 3"], *, columns: int) -> Image.Image:
    """The pictures, without a word, row by row."""
    pixels = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8).repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    height, width = pixels.shape[1] + MARGIN, pixels.shape[2] + MARGIN
    rows = -(-len(pixels) // columns)
    result = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for i, picture in enumerate(pixels):
        result.paste(Image.fromarray(picture), (MARGIN + i % columns * width, MARGIN + i // columns * height))
    return result


def write_sheet(path: Path, pictures: Float[np.ndarray, "n H W 3"], *, columns: int) -> None:
    """Writes the sheet as a JPEG: half of a PNG's bytes, where a palette would show bands."""
    sheet(pictures, columns=columns).save(path, quality=85, subsampling=0, optimize=True)


def write_curves(path: Path, *, clip: Rows, vae: Rows, decoder: Rows, unet: Rows, portraits: Rows) -> None:
    """Writes the loss curves of the stages, from the rows of their metrics.jsonl."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw(left, clip, "step", {"loss": "contrastive loss", "accuracy": "accuracy in a batch"})
    _draw(middle, vae, "step", {"psnr": "dB, a training batch"})
    _draw(middle, _continued(vae, decoder, "step"), "step", {"psnr": "the decoder alone"})
    _draw(right, unet, "epoch", {"loss": "denoising error"})
    _draw(right, _continued(unet, portraits, "epoch"), "epoch", {"loss": "on portraits"})
    for axes, title in (
        (left, "CLIP"),
        (middle, "VAE, then its decoder alone"),
        (right, "UNet, then on portraits"),
    ):
        axes.set_title(title)
    right.set_yscale("log")
    figure.savefig(path, dpi=80, metadata={"Software": None})


def _continued(first: Rows, second: Rows, x: str) -> Rows:
    """The rows of a stage that began where another ended."""
    end = first[-1][x]
    return [{**row, x: end + row[x]} for row in second]


def _draw(axes: Any, rows: Rows, x: str, names: Mapping[str, str]) -> None:
    # A stage that was stopped logs the steps since its checkpoint again: the last row of a step counts.
    latest = sorted({row[x]: row for row in rows}.items())
    for name, label in names.items():
        axes.plot([at for at, _ in latest], [row[name] for _, row in latest], label=label, linewidth=1)
    axes.set_xlabel("round" if x == "epoch" else x)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, fontsize="small")
