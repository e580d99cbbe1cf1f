"""What a vision tower sees of a picture, inside the graph: resized, cut, standardised; in every step differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpo_jax.errors import UserError, number
from ddpo_jax.models.folder import parsed, read_json

# The pixel statistics that every published CLIP uses.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

FILTERS = {1: "lanczos3", 2: "linear", 3: "cubic"}  # by Pillow's numbers


class Preprocess(NamedTuple):
    """What a preprocessor_config.json says, as transformers' CLIPImageProcessor reads it."""

    shorter: int | None  # pixels that the shorter side is resized to
    size: tuple[int, int] | None  # or height and width, whatever the proportions
    method: str  # of jax.image.resize
    crop: tuple[int, int] | None  # height and width that are cut out of the middle
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def seen(self) -> tuple[int, int] | None:
        """Height and width of what comes out; None if it depends on the picture."""
        return self.crop or self.size


def read(folder: Path, image_size: int) -> Preprocess:
    """The Preprocess of a model folder, or CLIP's own at `image_size` if it has no preprocessor_config.json.

    Raises:
        UserError: it asks for what is not supported, or not for what the tower, of `image_size` pixels, takes.
    """
    path = folder / "preprocessor_config.json"
    fields = read_json(path) if path.exists() else {}
    found = parsed(path, lambda fields: parse(fields, image_size), fields)
    if found.seen != (image_size, image_size):
        raise UserError(
            f"{path}: pictures come out as {found.seen} pixels, and the vision tower takes {image_size};"
            " copy it and config.json from one model"
        )
    return found


def parse(fields: Mapping[str, Any], image_size: int) -> Preprocess:
    """The Preprocess of a parsed preprocessor_config.json; absent fields have CLIPImageProcessor's defaults."""
    size = fields.get("size", image_size)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = fields.get("crop_size", image_size)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    resample = fields.get("resample", 3)
    if resample not in FILTERS:
        raise UserError(f"resample={resample!r}: expected 1 (Lanczos), 2 (bilinear) or 3 (bicubic), Pillow's numbers")
    steps = ("do_resize", "do_rescale", "do_normalize")
    if not all(fields.get(step, True) for step in steps):
        raise UserError(f"{', '.join(steps)} must be true: a tower takes pictures of one size, standardised")
    if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"rescale_factor={fields['rescale_factor']!r}: expected 1 / 255")
    fixed, cut = "height" in size, fields.get("do_center_crop", True)
    found = Preprocess(
        shorter=None if fixed else number(size, "shortest_edge"),
        size=(number(size, "height"), number(size, "width")) if fixed else None,
        method=FILTERS[resample],
        crop=(number(crop, "height"), number(crop, "width")) if cut else None,
        mean=_channels(fields, "image_mean", MEAN),
        std=_channels(fields, "image_std", STD),
    )
    smallest = found.size or (found.shorter, found.shorter)
    if found.crop and (found.crop[0] > smallest[0] or found.crop[1] > smallest[1]):
        raise UserError(f"crop_size={found.crop} is larger than what is resized to, {smallest}")
    return found


def apply(images: Float[Array, "b H W 3"], how: Preprocess) -> Float[Array, "b h w 3"]:
    """What the tower sees of pictures in [0, 1].

    Resized with antialiasing (bicubic with a = -0.5, as Pillow's), the width first, overshoot cut off after each axis;
    the middle cut out; standardised. It is transformers' processor but for rounding: Pillow, which resizes there,
    rounds to 8 bits after each axis. Pictures of the right size are only standardised.
    """
    _, H, W, _ = images.shape
    height, width = how.size or (H, W)
    if how.shorter is not None:
        height, width = (H * how.shorter // min(H, W), W * how.shorter // min(H, W))
    h, w = how.crop or (height, width)
    images = _resize_and_cut(images, 2, width, w, method=how.method)
    images = _resize_and_cut(images, 1, height, h, method=how.method)
    mean, std = (jnp.asarray(values, images.dtype)[None, None, None] for values in (how.mean, how.std))
    return (images - mean) / std


def _resize_and_cut(
    images: Float[Array, "b H W 3"], axis: int, size: int, kept: int, *, method: str
) -> Float[Array, "b h w 3"]:
    """The middle `kept` pixels along an axis of what the pictures are when that axis is resized to `size`."""
    before, first = images.shape[axis], (size - kept) // 2
    if size == before:
        return jax.lax.slice_in_dim(images, first, first + kept, axis=axis)
    shape = tuple(kept if i == axis else length for i, length in enumerate(images.shape))
    scale, shift = (jnp.array([value], images.dtype) for value in (size / before, -first))
    return jax.image.scale_and_translate(images, shape, (axis,), scale, shift, method=method, antialias=True).clip(0, 1)


def _channels(fields: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = fields.get(name, default)
    if len(values) != 3 or not all(np.isfinite(value) for value in values):
        raise UserError(f"{name}={values!r}: expected three numbers")
    return tuple(map(float, values))
