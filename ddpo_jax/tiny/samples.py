"""What a model draws when it is asked for each of the 45 animals, and what the judge takes the pictures for.

python -m ddpo_jax.tiny.samples --model=tiny --picture=runs/samples.jpg
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from ddpo_jax.finetune import full
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.stable_diffusion import freeze
from ddpo_jax.models.tokenizer import tokenize_all
from ddpo_jax.policy import make_policy, make_sampler, sample_keys
from ddpo_jax.sharding import one_device
from ddpo_jax.tiny import judge
from ddpo_jax.tiny.pictures import write_sheet
from ddpo_jax.tiny.render import ANIMALS, PROMPTS
from ddpo_jax.types import PyTree

NUM_SAMPLES = 8  # of each animal
NUM_STEPS = 20
ETA = 1.0
GUIDANCE_SCALE = 3.0
COLUMNS = 9


class Verdict(NamedTuple):
    """What the judge says of samples of every animal."""

    num_samples: int  # of each animal
    share: float  # of the samples: taken for the animal that was asked for
    num_recognised: int  # animals, at least half of whose samples are
    right: tuple[int, ...]  # of each animal's samples
    confusions: tuple[tuple[str, str, int], ...]  # asked for, taken for, how often; most often first


def draw(
    source: str, *, prompts: Sequence[str] = PROMPTS, num_samples: int = NUM_SAMPLES, num_steps: int = NUM_STEPS
) -> Float32[np.ndarray, "p n H W 3"]:
    """`num_samples` pictures of each prompt by a model (`tiny`, a diffusers folder or a hub id), at fixed noise."""
    model, pretrained = stable_diffusion.load(source, dtype=jnp.float32)
    policy = make_policy(model, num_steps=num_steps, eta=ETA, guidance_scale=GUIDANCE_SCALE)
    frozen = freeze(model, pretrained)
    program = make_sampler(model, policy, full().merge, layout=one_device())
    tokens = jnp.asarray(tokenize_all(pretrained.tokenizers, prompts))
    key, count = jax.random.key(0), len(prompts)
    keys = (sample_keys(key, np.arange(i * count, (i + 1) * count)) for i in range(num_samples))
    rounds = [np.asarray(program(pretrained.denoiser, frozen, tokens, own)[2]) for own in keys]
    return np.stack(rounds, axis=1)


def reconstruct(source: str, images: Float32[np.ndarray, "b H W 3"]) -> Float32[np.ndarray, "b H W 3"]:
    """The pictures once they went through the VAE of a model: encoded, drawn from the posterior, decoded."""
    model, pretrained = stable_diffusion.load(source, dtype=jnp.float32)
    keys = sample_keys(jax.random.key(1), np.arange(len(images)))

    @jax.jit
    def through(params: PyTree, images: Float32[Array, "b H W 3"]) -> Float32[Array, "b H W 3"]:
        return model.decode(params, model.sample_latent(model.encode(params, images), keys))

    return np.asarray(through(pretrained.vae, images))


def recognise_all(recognise: Callable, pictures: Float32[np.ndarray, "p n H W 3"]) -> Int[np.ndarray, "p n"]:
    """The index of the animal that each picture is taken for."""
    found = recognise(pictures.reshape(-1, *pictures.shape[2:]))
    return np.asarray(found).reshape(pictures.shape[:2])


def verdict(found: Int[np.ndarray, "45 n"]) -> Verdict:
    """Row i is what samples of animal i are taken for."""
    right = (found == np.arange(len(ANIMALS))[:, None]).sum(axis=1)
    wrong = Counter(
        (ANIMALS[asked], ANIMALS[taken]) for asked, row in enumerate(found) for taken in row if taken != asked
    )
    return Verdict(
        num_samples=found.shape[1],
        share=float(right.sum() / found.size),
        num_recognised=int((2 * right >= found.shape[1]).sum()),
        right=tuple(int(count) for count in right),
        confusions=tuple((asked, taken, count) for (asked, taken), count in wrong.most_common()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a diffusers folder or a hub id")
    parser.add_argument("--picture", type=Path, required=True, help="a JPEG: the first sample of each animal")
    flags = parser.parse_args()
    pictures = draw(flags.model)
    flags.picture.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(flags.picture, pictures[:, 0], columns=COLUMNS)
    result = verdict(recognise_all(judge.load(), pictures))
    print(f"recognised: {result.share:.1%} of the samples; at least half of them for {result.num_recognised} animals")
    print(*(f"{animal} {right}" for animal, right in zip(ANIMALS, result.right, strict=True)), sep=", ")
    print(*(f"{asked} taken for {taken}: {count}" for asked, taken, count in result.confusions), sep="\n")


if __name__ == "__main__":
    main()
