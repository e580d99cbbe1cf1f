"""What both torch parties share: prompts, a reward, and their agreement with a reference that another party wrote."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "trl")


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def brightness(images: torch.Tensor) -> torch.Tensor:
    """(b,) means of the pictures (b, 3, H, W)."""
    return images.mean(dim=(1, 2, 3))


def read(path: str) -> dict[str, torch.Tensor]:
    """The arrays of a reference, as torch has them: pictures and latents are (b, ..., c, h, w)."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}


def part(reference: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The arrays whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in reference.items() if name.startswith(prefix)}


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def distance(tree: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the second. Both have the same names."""
    if tree.keys() != other.keys():
        raise ValueError(f"these are in one alone: {sorted(tree.keys() ^ other.keys())[:5]}")
    difference = sum(float((tree[name].double() - x.double()).square().sum()) for name, x in other.items())
    return (difference / sum(float(x.double().square().sum()) for x in other.values())) ** 0.5
