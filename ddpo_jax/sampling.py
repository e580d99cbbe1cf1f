"""Pictures from a model outside of its run: the flags that say how, and the drawing.

Picture i of a seed starts from the same noise with every model, so that models can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8
from ml_collections import ConfigDict

from ddpo_jax.command import add_base_flags
from ddpo_jax.errors import UserError
from ddpo_jax.models.stable_diffusion import freeze
from ddpo_jax.models.tokenizer import find_too_long, tokenize_all
from ddpo_jax.policy import check_sampling, make_policy, make_sampler, sample_keys
from ddpo_jax.saved import Loaded
from ddpo_jax.sharding import one_device

NUM_STEPS, GUIDANCE_SCALE = 50, 5.0  # where no run says otherwise
FLAGS = {
    "pretrained.model": "--model",
    "pretrained.resolution": "--resolution",
    "pretrained.variant": "--variant",
    "prompts.name": "--prompts",
    "sample.eta": "--eta",
    "sample.guidance_scale": "--guidance_scale",
}


class Settings(NamedTuple):
    """How pictures are drawn."""

    num_steps: int
    guidance_scale: float
    eta: float


def add_sampling_flags(parser: argparse.ArgumentParser, *, chunk_size: int) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--num_steps", type=int, help=f"DDIM steps; the run's own by default, or {NUM_STEPS}")
    add("--guidance_scale", type=float, help=f"1 is off; the run's own by default, or {GUIDANCE_SCALE:g}")
    add("--eta", type=float, default=0.0, help="noise of a step: 0 (by default) is deterministic, 1 as DDPM")
    add("--resolution", type=int, help="pixels, one side; the model's own by default")
    add("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    add("--chunk_size", type=int, default=chunk_size, help=f"pictures a program call; {chunk_size} by default")
    add_base_flags(parser)
    add("--compilation_cache", default="~/.cache/ddpo_jax", help="folder of compiled programs; empty: none")


def check_sampling_flags(flags: argparse.Namespace, *counts: str) -> None:
    """Raises UserError for what can be told before the model is there. counts: more flags of 1 or more."""
    for name in (*counts, "chunk_size", "num_steps", "resolution"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed={flags.seed}: expected 0 to 2^32 - 1")
    check_sampling(flags.eta, GUIDANCE_SCALE if flags.guidance_scale is None else flags.guidance_scale)


def settings_of(flags: argparse.Namespace, configs: Sequence[ConfigDict]) -> Settings:
    """What the flags say, or else the first of the runs, or the defaults. configs: of the models that are runs."""
    own = configs[0].sample if configs else {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE}
    given = {name: getattr(flags, name) for name in ("num_steps", "guidance_scale")}
    return Settings(**{name: own[name] if value is None else value for name, value in given.items()}, eta=flags.eta)


def tell_too_long(loaded: Loaded, texts: Sequence[str]) -> None:
    """A note where the model cuts a prompt."""
    cut = find_too_long(loaded.pretrained.tokenizers[0], texts)
    if cut:
        print(f"note: {len(cut)} prompts are too long for the model and are cut, such as {cut[0]!r}", file=sys.stderr)


def make_draw(loaded: Loaded, settings: Settings, *, seed: int) -> Callable:
    """A function: texts, index (b,) of each picture -> pictures (b, H, W, 3), one a text.

    A picture's noise depends on `seed` and its index alone.
    """
    model, pretrained, tuning = loaded.model, loaded.pretrained, loaded.tuning
    program = make_sampler(model, make_policy(model, **settings._asdict()), tuning.merge, layout=one_device())
    frozen, key = freeze(model, pretrained), jax.random.key(seed)

    def draw(texts: Sequence[str], index: Int[np.ndarray, " b"]) -> Float[Array, "b H W 3"]:
        tokens = tokenize_all(pretrained.tokenizers, texts)
        return program(loaded.trainable, frozen, tokens, sample_keys(key, index))[2]

    return draw


def chunks(count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " b"], int]]:
    """The numbers from 0 to below `count`, `size` at a time, and how many of them are meant.

    The last is filled up with numbers from `count` on, so that there is one shape.
    """
    size = min(size, count)
    for first in range(0, count, size):
        yield np.arange(first, first + size), min(size, count - first)


def draw_all(draw: Callable, texts: Sequence[str], *, chunk_size: int) -> Float32[np.ndarray, "b H W 3"]:
    """One picture a text, with the indices from 0. draw: as `make_draw` gives it."""
    made = []
    for index, count in chunks(len(texts), chunk_size):
        images = draw([texts[min(i, len(texts) - 1)] for i in index], index)
        made.append(np.asarray(images)[:count])
    return np.concatenate(made)


def as_bytes(images: Float[np.ndarray, "b H W 3"]) -> UInt8[np.ndarray, "b H W 3"]:
    """8 bits of finite pixels in [0, 1]."""
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)
