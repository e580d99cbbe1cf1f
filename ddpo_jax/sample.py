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

import numpy as np
from jaxtyping import Float32
from PIL import Image

from ddpo_jax import data, metrics, runtime, saved
from ddpo_jax.command import base_of, check_output, describe, run_command
from ddpo_jax.errors import UserError
from ddpo_jax.sampling import (
    FLAGS,
    add_sampling_flags,
    as_bytes,
    check_sampling_flags,
    draw_all,
    make_draw,
    settings_of,
    tell_too_long,
)
from ddpo_jax.workdir import replace_file, write_atomically

GRID = 64  # pictures at most


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
    add_sampling_flags(parser, chunk_size=4)
    return parser


def sample(flags: argparse.Namespace) -> None:
    """Draws and writes what the flags ask for.

    Raises:
        UserError: a flag, the model or the output folder cannot be used.
    """
    check_sampling_flags(flags, "num_images")
    output = flags.output.expanduser()
    check_output(output)
    texts = read_prompts(flags)
    runtime.set_up(flags.compilation_cache)
    loaded = saved.load(flags.model, dtype=flags.compute_dtype, resolution=flags.resolution, base=base_of(flags))
    settings = settings_of(flags, [loaded.config] if loaded.config else [])
    tell_too_long(loaded, texts)
    repeated = [text for text in texts for _ in range(flags.num_images)]
    images = draw_all(make_draw(loaded, settings, seed=flags.seed), repeated, chunk_size=flags.chunk_size)
    output.mkdir(parents=True, exist_ok=True)
    told = {"model": flags.model, "seed": flags.seed, **settings._asdict(), "compute_dtype": flags.compute_dtype}
    write(output, images, [{"text": text, "index": i, **told} for i, text in enumerate(repeated)])
    print(f"{output}: {len(images)} pictures of {images.shape[1]} pixels")


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
    for name, picture in zip(names, as_bytes(images), strict=True):
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
