"""Pictures of a model, drawn for prompts and scored chunk by chunk, outside of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from ddpo_jax import rewards, sampling, scoring
from ddpo_jax.models.locate import TINY
from ddpo_jax.report.pictures import data_uri
from ddpo_jax.rewards import clip
from ddpo_jax.saved import Loaded
from ddpo_jax.types import Prompts, PyTree, Reward


class Drawn(NamedTuple):
    """What a model drew, in the order of the prompts."""

    scores: Float32[np.ndarray, "n experts"]  # NaN where missing
    whys: list[str]  # why scores are missing; "" where none is, or where that is not known
    features: Float[np.ndarray, "n d"] | None
    pictures: list[str]  # data URIs, small: the page chooses among them when all are scored
    size: int  # pixels, one side


def is_embedded(model: Loaded) -> bool:
    """Whether it is the embedded model, or a run that began with it."""
    return model.pretrained.source.folder == TINY


def try_out(reward: Reward, params: tuple[PyTree, ...], prompts: Prompts, model: Loaded) -> None:
    """Raises what a reward that cannot work raises, before anything is drawn."""
    latent = jax.ShapeDtypeStruct((1, *model.model.latent_shape), np.float32)
    resolution = jax.eval_shape(model.model.decode, model.pretrained.vae, latent).shape[1]
    first = rewards.take(prompts, np.arange(min(2, len(prompts.texts))))
    rewards.probe(reward, params, first, resolution=resolution)


def load_features(source: str) -> Callable:
    """pictures -> their embeddings, of length 1. source: a CLIP, as in clip.load."""
    found = clip.load(source, field="--features")
    embed = jax.jit(found.embed_images)
    return lambda images: embed(found.params, images)


def draw_and_score(
    draw: Callable,
    reward: Reward,
    params: tuple[PyTree, ...],
    prompts: Prompts,
    embed: Callable | None,
    *,
    chunk_size: int,
    in_flight: int,
) -> Drawn:
    """A picture of each prompt, number i from the noise of index i, and what it is worth."""
    total = len(prompts.texts)
    features, pictures, size = [], [], 0

    def chunks() -> Iterator[tuple[np.ndarray, int, Any, Prompts]]:
        nonlocal size
        for index, count in sampling.chunks(total, chunk_size):
            chosen = rewards.take(prompts, np.minimum(index, total - 1))
            images = draw(chosen.texts, index)
            yield index[:count], count, images, chosen
            if embed:
                features.append(np.asarray(embed(images))[:count])
            pixels = sampling.as_bytes(np.nan_to_num(np.asarray(images)[:count]))
            pictures.extend(data_uri(Image.fromarray(picture)) for picture in pixels)
            size = pixels.shape[1]

    scores, whys = np.full((total, len(reward.names)), np.nan, np.float32), [""] * total
    for index, found, why in scoring.score_chunks(reward, params, chunks(), in_flight=in_flight):
        scores[index] = found
        for i in index[np.isnan(found).any(axis=1)]:
            whys[i] = why
    return Drawn(scores, whys, np.concatenate(features) if embed else None, pictures, size)
