"""CLIPs in transformers' format, loaded once to embed pictures and texts in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ddpo_jax.errors import UserError
from ddpo_jax.models import preprocess
from ddpo_jax.models.clip import CLIPConfig, CLIPModel, clip_config
from ddpo_jax.models.folder import parsed, read_json, read_weights, weight_files
from ddpo_jax.models.locate import TINY_CLIP, clip_files, locate
from ddpo_jax.models.tokenizer import check_tokenizer, load_tokenizer, tokenize
from ddpo_jax.rewards.pixels import PixelBatch, as_pixels
from ddpo_jax.sharding import first_device
from ddpo_jax.types import PyTree


class CLIP(NamedTuple):
    """A CLIP folder's network as pure functions, its parameters in float32, and its own tokenizer."""

    embed_images: Callable  # params, images (b, H, W, 3) in [0, 1] or uint8 -> (b, d) of length 1
    embed_texts: Callable  # params, tokens (b, s) -> (b, d) of length 1
    describe_images: Callable  # as embed_images -> (b, e): the embedding, and after it what it leaves out
    params: PyTree
    tokenize: Callable  # texts -> (b, s) int32
    width: int  # of the embeddings
    described: int  # numbers that describe_images gives
    fingerprint: str  # of its weights, whatever precision they are stored in


def load(source: str, *, field: str = "reward.clip_model", place: Callable = first_device) -> CLIP:
    """The CLIP in a folder as transformers saves it: config.json, model.safetensors, the tokenizer's files, and
    preprocessor_config.json if it does not see pictures as CLIP does by default.

    It computes in what it is given: float32, whatever a run computes in, or float64.

    source: "tiny", a folder or a hub id.  field: the config's, for errors.  place: as in read_weights.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file.
    """
    if not source:
        raise UserError(f"{field}='': expected a CLIP: a folder as transformers saves it, a hub id, or tiny")
    folder = locate(source, field=field, tiny=TINY_CLIP, hub_files=clip_files)
    config = read_config(folder)
    module, size = CLIPModel(config, dtype=None), config.vision.image_size
    how = preprocess.read(folder, size)
    tokens, pixels = jnp.zeros((1, config.text.max_length), jnp.int32), jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, pixels)["params"]
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, folder, "config.json", config.text.max_length, config.text.vocab_size)

    def embed_images(params: PyTree, images: PixelBatch) -> Float[Array, "b d"]:
        pixels = preprocess.apply(as_pixels(images), how)
        return module.apply({"params": params}, pixels, method="encode_image")

    def describe_images(params: PyTree, images: PixelBatch) -> Float[Array, "b e"]:
        pixels = preprocess.apply(as_pixels(images), how)
        return module.apply({"params": params}, pixels, method="describe_image")

    def embed_texts(params: PyTree, tokens: Int[Any, "b s"]) -> Float[Array, "b d"]:
        return module.apply({"params": params}, jnp.asarray(tokens), method="encode_text")

    files = weight_files(folder, "model", None)
    return CLIP(
        embed_images,
        embed_texts,
        describe_images,
        read_weights(files, shapes, place=place),
        lambda texts: tokenize(tokenizer, texts),
        config.projection_dim,
        config.projection_dim + 2 * config.vision.tower.width,
        _fingerprint(files, shapes),
    )


def _fingerprint(files: Sequence[Path], shapes: PyTree) -> str:
    """Of the projection of pictures alone, which every published CLIP has its own of: few numbers, soon read."""
    own = {"visual_projection": shapes["visual_projection"]}
    found = read_weights(files, own, passed_over=lambda name: name != "visual_projection.weight", place=None)
    kernel = np.asarray(found["visual_projection"]["kernel"], np.float16)
    return hashlib.sha256(kernel.astype("<f2").tobytes()).hexdigest()[:16]


def read_config(folder: Path) -> CLIPConfig:
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "clip":
        raise UserError(
            f"{folder}/config.json: model_type {fields.get('model_type')!r} is not supported; expected 'clip'"
        )
    return parsed(folder / "config.json", clip_config, fields)


def text_similarity(clip: CLIP) -> Callable[[Sequence[str], Sequence[str]], Float32[np.ndarray, " n"]]:
    """A function of two lists of texts: 100 cos(E_T(a), E_T(b)) of each pair, such as a caption and its prompt."""
    embed = jax.jit(clip.embed_texts)

    def score(candidates: Sequence[str], references: Sequence[str]) -> Float32[np.ndarray, " n"]:
        count = len(candidates)
        size = max(1, 1 << (2 * count - 1).bit_length())  # few programs: both lists, filled up to a power of two
        tokens = clip.tokenize([*candidates, *references, *[""] * (size - 2 * count)])
        embedded = np.asarray(embed(clip.params, tokens))
        return 100 * (embedded[:count] * embedded[count : 2 * count]).sum(axis=1)

    return score
