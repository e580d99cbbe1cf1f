"""LAION's aesthetic predictor: what people would rate a picture, from 1 to 10, whatever it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.errors import UserError
from ddpo_jax.models.folder import read_weights
from ddpo_jax.models.mlp import ScoreMLP
from ddpo_jax.models.torch_file import read_torch_weights
from ddpo_jax.rewards import clip
from ddpo_jax.rewards.kinds import nothing
from ddpo_jax.rewards.pixels import PixelBatch
from ddpo_jax.sharding import first_device
from ddpo_jax.types import PyTree


def make(head: str, clip_source: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of the aesthetic score: an MLP, 768-1024-128-64-16-1, of CLIP L/14's picture embedding.

    r = MLP(E_I / ‖E_I‖): Schuhmann 2022, improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE), as in Black et
    al. 2023, Sec. 5. Typically 4 to 7. The prompt is not read.

    head: `reward.aesthetic_model`, the file of the MLP: .pth as published, of which plain tensors are read and nothing
    is run, or .safetensors.  clip_source: `reward.aesthetic_clip`, such as openai/clip-vit-large-patch14.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file.
    """
    found = clip.load(clip_source, field="reward.aesthetic_clip", place=place)
    mlp = ScoreMLP()
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), jnp.zeros((1, found.width)))["params"]
    params = {"clip": found.params, "mlp": read_head(head, shapes, place=place)}

    def pure(params: PyTree, images: PixelBatch, inputs: tuple[()]) -> Float[Array, " b"]:
        return mlp.apply({"params": params["mlp"]}, found.embed_images(params["clip"], images))

    return pure, nothing, params


def read_head(source: str, like: PyTree, *, place: Callable) -> PyTree:
    """The MLP's parameters, with the structure and shapes of `like`."""
    if not source:
        raise UserError(
            "reward.aesthetic_model='': expected the file of LAION's MLP, such as sac+logos+ava1-l14-linearMSE.pth, or"
            " the same as .safetensors"
        )
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        return read_weights((path,), like, place=place)
    return read_torch_weights(path, like, place=place)
