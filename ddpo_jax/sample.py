"""Draw pictures with any model: a diffusers folder, a hub id, `tiny`, a run's folder or a checkpoint in it.

python -m ddpo_jax.sample --model=tiny --prompt="a fox" --prompt="a frog" --num_images=4 --output=DIR
python -m ddpo_jax.sample --model=runs/quickstart/checkpoints/10 --prompts=common_animals --output=DIR

Writes 00000.png, 00001.png, ..., all of them on one sheet as grid.png, and metadata.jsonl, which says of each picture
what it was made of. Picture i of a seed starts from the same noise with every model, so that models can be compared.
--eta=0 is the deterministic DDIM sampler, --eta=1 the stochastic one that DDPO trains.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from PIL import Image

from ddpo_jax import data, metrics, saved
from ddpo_jax.command import add_base_flags, base_of, check_output, describe, run_command
from ddpo_jax.errors import UserError
from ddpo_jax.models.stable_diffusion import freeze
from ddpo_jax.models.tokenizer import find_too_long, tokenize_all
from ddpo_jax.policy import check_sampling, make_policy, make_sampler, sample_keys
from ddpo_jax.sharding import one_device
from ddpo_jax.workdir import replace_file, write_atomically

NUM_STEPS, GUIDANCE_SCALE = 50, 5.0  # where no run says otherwise
GRID = 64  # pictures at most
FLAGS = {
    "pretrained.model": "--model",
    "pretrained.resolution": "--resolution",
    "pretrained.variant": "--variant",
    "prompts.name": "--prompts",
    "sample.eta": "--eta",
    "sample.guidance_scale": "--guidance_scale",
}


def main(argv: list[str] | None = None) -> int:
    return run_command(sample, parser(), argv, flag_of=FLAGS)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a diffusers folder, a hub id, tiny, a run's folder, or checkpoints/STEP in it")
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts", default="", help="a UTF-8 file with one prompt a line, or a set such as common_animals")
    add("--output", required=True, type=Path, help="the folder to write to")
    add("--num_images", type=int, default=1, help="of each prompt; 1 by default")
    add("--seed", type=int, default=0)
    add("--num_steps", type=int, help=f"DDIM steps; the run's own by default, or {NUM_STEPS}")
    add("--guidance_scale", type=float, help=f"1 is off; the run's own by default, or {GUIDANCE_SCALE:g}")
    add("--eta", type=float, default=0.0, help="noise of a step: 0 (by default) is deterministic, 1 as DDPM")
    add("--resolution", type=int, help="pixels, one side; the model's own by default")
    add("--compute_dtype", default="float32", choices=("float32", "bfloat16"))
    add("--chunk_size", type=int, default=4, help="pictures a program call; 4 by default")
    add_base_flags(parser)
    add("--compilation_cache", default="~/.cache/ddpo_jax", help="folder of compiled programs; empty: none")
    return parser


def sample(flags: argparse.Namespace) -> None:
    """Draws and writes what the flags ask for.

    Raises:
        UserError: a flag, the model or the output folder cannot be used.
    """
    check(flags)
    texts, output = read_prompts(flags), flags.output.expanduser()
    if flags.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(flags.compilation_cache).expanduser()))
    loaded = saved.load(flags.model, dtype=flags.compute_dtype, resolution=flags.resolution, base=base_of(flags))
    settings = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "eta": flags.eta}
    for name in ("num_steps", "guidance_scale"):
        if getattr(flags, name) is not None:
            settings[name] = getattr(flags, name)
        elif loaded.config:
            settings[name] = loaded.config.sample[name]
    cut = find_too_long(loaded.pretrained.tokenizers[0], texts)
    if cut:
        print(f"note: {len(cut)} prompts are too long for the model and are cut, such as {cut[0]!r}", file=sys.stderr)
    repeated = [text for text in texts for _ in range(flags.num_images)]
    images = draw(loaded, repeated, seed=flags.seed, chunk_size=flags.chunk_size, **settings)
    output.mkdir(parents=True, exist_ok=True)
    told = {"model": flags.model, "seed": flags.seed, **settings, "compute_dtype": flags.compute_dtype}
    write(output, images, [{"text": text, "index": i, **told} for i, text in enumerate(repeated)])
    print(f"{output}: {len(images)} pictures of {images.shape[1]} pixels")


def check(flags: argparse.Namespace) -> None:
    """Raises UserError for what can be told before the model is there."""
    for name in ("num_images", "chunk_size", "num_steps", "resolution"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed={flags.seed}: expected 0 to 2^32 - 1")
    check_sampling(flags.eta, GUIDANCE_SCALE if flags.guidance_scale is None else flags.guidance_scale)
    check_output(flags.output.expanduser())


def read_prompts(flags: argparse.Namespace) -> tuple[str, ...]:
    """The prompts that the flags give, an empty one too.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    texts = tuple(flags.prompt)
    if flags.prompts:
        texts += data.prompt_source(flags.prompts).texts
    if not texts:
        raise UserError("no prompt: give --prompt=TEXT, once or several times, or --prompts=FILE")
    return texts


def draw(
    loaded: saved.Loaded,
    texts: list[str],
    *,
    seed: int,
    num_steps: int,
    eta: float,
    guidance_scale: float,
    chunk_size: int,
) -> Float32[np.ndarray, "b H W 3"]:
    """One picture a text. Picture i's noise depends on `seed` and i alone."""
    model, pretrained, tuning = loaded.model, loaded.pretrained, loaded.tuning
    policy = make_policy(model, num_steps=num_steps, eta=eta, guidance_scale=guidance_scale)
    program = make_sampler(model, policy, tuning.merge, layout=one_device())
    frozen = freeze(model, pretrained)
    tokens, key, chunks = tokenize_all(pretrained.tokenizers, texts), jax.random.key(seed), []
    size = min(chunk_size, len(texts))
    for first in range(0, len(texts), size):
        index = np.arange(first, first + size)
        chosen = np.minimum(index, len(texts) - 1)  # one shape: the last is filled up
        _, _, images = program(loaded.trainable, frozen, tokens[chosen], sample_keys(key, index))
        chunks.append(np.asarray(images))
    return np.concatenate(chunks)[: len(texts)]


def write(output: Path, images: Float32[np.ndarray, "b H W 3"], rows: list[dict[str, Any]]) -> None:
    """Writes the pictures, the sheet and metadata.jsonl, each whole or not at all.

    Raises:
        UserError: a picture is not finite.
    """
    if not np.isfinite(images).all():
        raise UserError("the model drew pictures that are not finite; try --compute_dtype=float32")
    names = [f"{i:05d}.png" for i in range(len(images))]
    for row in metrics.read(output / "metadata.jsonl")[len(names) :]:  # of more pictures, drawn here before
        (output / Path(row["file_name"]).name).unlink(missing_ok=True)
    pixels = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    for name, picture in zip(names, pixels, strict=True):
        save(output / name, Image.fromarray(picture))
    save(output / "grid.png", metrics.grid(images[:GRID], [row["text"] for row in rows[:GRID]]))
    lines = (json.dumps({"file_name": name, **row}) + "\n" for name, row in zip(names, rows, strict=True))
    write_atomically(output / "metadata.jsonl", "".join(lines))


def save(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
