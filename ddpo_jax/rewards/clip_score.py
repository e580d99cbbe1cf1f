"""The CLIP score: how well a picture fits its prompt, by any CLIP in transformers' format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import MEAN, STD, CLIPConfig, CLIPModel, clip_config
from ddpo_jax.models.folder import parsed, read_json, read_weights, weight_files
from ddpo_jax.models.locate import TINY_CLIP, clip_files, locate
from ddpo_jax.models.tokenizer import check_tokenizer, load_tokenizer, tokenize
from ddpo_jax.sharding import first_device
from ddpo_jax.types import Prompts, PyTree


class LoadedCLIP(NamedTuple):
    """A CLIP folder's network, its float32 parameters, and its own tokenizer."""

    module: CLIPModel
    params: PyTree
    tokenize: Callable  # texts -> (b, s) int32


def make(source: str, template: str, *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of the cosine similarity of picture and prompt, times 100.

    100 cos(E_I, E_T): the score of Radford et al. 2021 before its softmax, and CLIPScore (Hessel et al. 2021) without
    its 2.5 and without cutting negative values off. float32, whatever the run computes in: the prompts' own scores are
    a few units apart.

    source: as in `load`.  template: what is scored in place of a prompt, which stands where it has {}, such as
    "a photo of a {}" (Radford et al. 2021, Sec. 3.1.4). Differentiable in the pictures.
    """
    if "{}" not in template:
        raise UserError(f"reward.clip_template={template!r}: expected {{}} in it, where the prompt stands")
    module, params, tokenize_texts = load(source, place=place)
    size = module.config.vision.image_size

    def pure(params: PyTree, images: Float[Array, "b H W 3"], tokens: Int[Any, "b s"]) -> Float[Array, " b"]:
        picture = module.apply({"params": params}, preprocess(images, size), method="encode_image")
        text = module.apply({"params": params}, jnp.asarray(tokens), method="encode_text")
        return 100.0 * (picture * text).sum(axis=-1)

    def prepare(prompts: Prompts) -> Int32[np.ndarray, "b s"]:
        return np.asarray(tokenize_texts([template.replace("{}", text) for text in prompts.texts]))

    return pure, prepare, params


def load(source: str, *, place: Callable = first_device) -> LoadedCLIP:
    """The CLIP in a folder as transformers saves it: config.json, model.safetensors and the tokenizer's files.

    source: `reward.clip_model`: "tiny", a folder or a hub id.  place: as in read_weights.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file.
    """
    if not source:
        raise UserError(
            "reward.clip_model='': clip_score needs a CLIP; give a folder as transformers saves it, a hub id, or tiny"
        )
    folder = locate(source, field="reward.clip_model", tiny=TINY_CLIP, hub_files=clip_files)
    module = CLIPModel(read_config(folder))
    config = module.config
    tokens = jnp.zeros((1, config.text.max_length), jnp.int32)
    pixels = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, pixels)["params"]
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, folder, "config.json", config.text.max_length, config.text.vocab_size)
    params = read_weights(weight_files(folder, "model", None), shapes, place=place)
    return LoadedCLIP(module, params, lambda texts: tokenize(tokenizer, texts))


def read_config(folder: Path) -> CLIPConfig:
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "clip":
        raise UserError(
            f"{folder}/config.json: model_type {fields.get('model_type')!r} is not supported; expected 'clip'"
        )
    return parsed(folder / "config.json", clip_config, fields)


def preprocess(images: Float[Array, "b H W 3"], size: int) -> Float[Array, "b size size 3"]:
    """What a CLIP that was trained at `size` pixels sees of pictures in [0, 1].

    The shorter side is resized to `size` (bicubic with a = -0.5, antialiased), the middle is cut out, and the pixels
    are standardised by CLIP's own statistics. It is transformers' CLIPImageProcessor but for rounding: Pillow, which
    resizes there, rounds to 8 bits after each axis. Pictures of the right size are only standardised.
    """
    b, H, W, _ = images.shape
    shorter = min(H, W)
    height, width = H * size // shorter, W * size // shorter
    if shorter != size:
        # As Pillow does it with square pictures: the width first, and overshoot cut off after each axis.
        for shape in ((b, H, width, 3), (b, height, width, 3)):
            images = jax.image.resize(images, shape, method="cubic", antialias=True).clip(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return (images[:, top : top + size, left : left + size] - MEAN[None, None, None]) / STD[None, None, None]
