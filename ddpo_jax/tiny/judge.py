"""The judge: a small convnet that tells the 45 animals apart, and has seen nothing but renderings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ddpo_jax.models.convnet import ConvNet
from ddpo_jax.models.folder import read_json, read_weights, write_json, write_weights
from ddpo_jax.models.locate import TINY
from ddpo_jax.tiny.fit import fit, rendered
from ddpo_jax.tiny.render import ANIMALS, RESOLUTION, animal_of
from ddpo_jax.types import PyTree

JUDGE = TINY.parent / "tiny-judge"
WEIGHTS = "model.safetensors"
BATCH = 64
FIRST_INDEX = 3_000_000_000  # of the rendered pictures; each stage has its own
HELD_OUT_INDEX = 9_100_000_000
HELD_OUT = 1024
# Pixel noise, up to this standard deviation: it hides the one-pixel edges that only a renderer draws, so that the judge
# goes by shapes and colours, and does not fail a good picture for a decoder's softness.
NOISE = 0.1

CONFIG = {"features": [24, 48, 96, 128], "num_groups": 8, "num_classes": len(ANIMALS)}


def load(folder: Path = JUDGE) -> Callable[[Float[Array, "b H W 3"]], Int[Array, " b"]]:
    """The shipped judge: a jitted function from pictures in [0, 1] to indices in ANIMALS.

    Raises:
        UserError: the folder is not a judge's.
    """
    module = make_module(read_json(folder / "config.json"))
    params = read_weights([folder / WEIGHTS], jax.eval_shape(lambda: init(module, jax.random.key(0))))

    @jax.jit
    def recognise(images: Float[Array, "b H W 3"]) -> Int[Array, " b"]:
        return module.apply({"params": params}, images).argmax(axis=-1)

    return recognise


def recognised(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """A reward on the host: 1 where a picture is taken for the animal that its prompt names, else 0.

    Of a prompt that names none of the 45 animals the judge knows nothing: NaN.
    """
    asked = np.array([animal_of(prompt) for prompt in prompts], np.float32)  # None is NaN
    return np.where(np.isnan(asked), asked, np.asarray(_shipped()(images)) == asked).astype(np.float32)


def share_right(recognise: Callable, images: Float[np.ndarray, "b H W 3"], captions: list[str]) -> float:
    """The share of pictures whose animal is recognised."""
    return float(np.mean(np.asarray(recognise(images)) == labels(captions)))


def labels(captions: Sequence[str]) -> Int[np.ndarray, " b"]:
    """The indices of the animals that captions name."""
    return np.array([animal_of(caption) for caption in captions], np.int32)


def make_module(config: dict) -> ConvNet:
    return ConvNet(tuple(config["features"]), config["num_groups"], config["num_classes"])


def init(module: ConvNet, key) -> PyTree:
    return module.init(key, jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]


def train(workdir: Path, folder: Path, *, num_steps: int) -> float:
    """Trains the judge, writes it to `folder` in float16, and returns its accuracy there on held-out pictures."""
    workdir.mkdir(parents=True, exist_ok=True)
    module = make_module(CONFIG)

    def make_batch(step):
        images, captions = rendered(FIRST_INDEX + step * BATCH, BATCH)
        return images, labels(captions)

    def loss(params, batch, key):
        images, animal = batch
        key_std, key_noise = jax.random.split(key)
        std = jax.random.uniform(key_std, (BATCH, 1, 1, 1), maxval=NOISE)
        logits = module.apply({"params": params}, images + std * jax.random.normal(key_noise, images.shape))
        error = optax.softmax_cross_entropy_with_integer_labels(logits, animal).mean()
        return error, {"loss": error, "accuracy": (logits.argmax(axis=-1) == animal).mean()}

    params = fit(loss, lambda key: init(module, key), make_batch, workdir, num_steps=num_steps, learning_rate=3e-3)
    write_json(folder / "config.json", {"animals": list(ANIMALS), **CONFIG})
    write_weights(folder / WEIGHTS, params, dtype=np.float16)
    return share_right(load(folder), *rendered(HELD_OUT_INDEX, HELD_OUT))


@cache
def _shipped() -> Callable:
    return load()
