"""Fit a reward to preferences among pairs of pictures, the first stage of RLHF, and keep it as a file.

python -m ddpo_jax.fit_reward --data=DIR --clip=openai/clip-vit-large-patch14 --output=reward.safetensors

DIR holds pairs.jsonl: a line is {"prompt": ..., "image_0": file, "image_1": file, "label": number}, the files relative
to DIR, the label 1 where image_0 is preferred, 0 where image_1 is, or how surely, in between; ties, 0.5, teach nothing
and are left out. Or --data=module:function with --num_pairs. The CLIP is frozen: each picture goes through it once,
and a Bradley-Terry head learns from what it gives. Whole prompts are held out to tell how well the head foretells
preferences that it has not seen. The file is a reward for any run, with a gradient:

python -m ddpo_jax.main --config.reward.name=learned_reward --config.reward.learned_model=reward.safetensors ...
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ddpo_jax import bradley_terry, preferences, runtime
from ddpo_jax.bradley_terry import MIN_PROMPTS, PATIENCE, Comparisons, Fitted
from ddpo_jax.command import check_output, describe, run_command
from ddpo_jax.errors import UserError
from ddpo_jax.rewards import clip, learned

RESOLUTION = (
    "pixels of a side that pictures are cut and resized to before the CLIP does so: that of the model to be trained;"
    " the shorter side of the first picture by default, so that pictures of its size are only cut"
)
FLAGS = {"data.source": "--data", "reward.learned_clip": "--clip"}


def main(argv: list[str] | None = None) -> int:
    return run_command(fit_reward, parser(), argv, flag_of=FLAGS)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="a folder with pairs.jsonl, or module:function, as for data.source of a run")
    add("--clip", required=True, help="the CLIP under the head: a folder, a hub id, or tiny, the embedded one")
    add("--output", required=True, type=Path, help="the file to write, reward.safetensors")
    add("--num_pairs", type=int, help="of module:function, or of a folder where not all are wanted")
    add("--held_out", type=float, default=0.1, help="the fraction of pairs that are not learned from; 0.1 by default")
    add("--hidden", default="", help="widths of hidden layers, such as 256,64; none by default, which needs least data")
    add("--learning_rate", type=float, help="of AdamW; 3e-3 by default, 3e-4 with hidden layers")
    add("--weight_decay", type=float, default=0.1, help="of AdamW; 0.1 by default")
    add("--batch_size", type=int, default=64, help="pairs a step; 64 by default")
    add("--num_epochs", type=int, default=100, help=f"at most; {PATIENCE} without a better held-out loss end it too")
    add("--resolution", type=int, help=RESOLUTION)
    add("--chunk_size", type=int, default=16, help="pairs that go through the CLIP together; 16 by default")
    add("--seed", type=int, default=0)
    add("--compilation_cache", default="~/.cache/ddpo_jax", help="folder of compiled programs; empty: none")
    return parser


def fit_reward(flags: argparse.Namespace) -> None:
    """Fits and writes what the flags ask for, and tells how well it foretells preferences.

    Raises:
        UserError: a flag, the pairs or the CLIP cannot be used.
        RunStopped: nothing finite was learned.
    """
    settings, output = read_settings(flags), flags.output.expanduser()
    runtime.set_up(flags.compilation_cache)
    resolution = flags.resolution or preferences.shorter_side(flags.data)
    source = preferences.open_source(flags.data, resolution=resolution)
    count = count_of(source, flags)
    found = clip.load(flags.clip, field="reward.learned_clip")
    data = embed(found, source, count=count, resolution=resolution, seed=flags.seed, chunk_size=flags.chunk_size)
    decided = np.flatnonzero(data.labels != 0.5)
    if len(decided) < 2:
        raise UserError(
            f"--data={flags.data}: {len(decided)} of {count} pairs are no ties; expected 2 or more to learn"
        )
    if len(decided) < count:
        print(f"{count - len(decided)} ties are left out")
    data = bradley_terry.take(data, decided)
    held = bradley_terry.hold_out(data.prompts, fraction=flags.held_out, seed=flags.seed)
    fitted = bradley_terry.fit(data, held, settings)
    figures = figures_of(data, held, fitted) | {"resolution": resolution}
    about = learned.About(flags.clip, found.width, found.fingerprint, settings.hidden, figures)
    learned.write(output, fitted.params, about)
    report(figures)
    print(
        f"{output}: use it with --config.reward.name=learned_reward --config.reward.learned_model={output}, or score"
        f" pictures: python -m ddpo_jax.score --reward=learned_reward --config.reward.learned_model={output} ..."
    )


def read_settings(flags: argparse.Namespace) -> bradley_terry.Settings:
    """The flags that a fit depends on.

    Raises:
        UserError: a flag is out of its range, or the output cannot be written.
    """
    for name in ("batch_size", "num_epochs", "chunk_size", "num_pairs", "resolution"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed={flags.seed}: expected 0 to 2^32 - 1")
    if not 0 < flags.held_out < 1:
        raise UserError(f"--held_out={flags.held_out}: expected a fraction above 0 and below 1")
    try:
        hidden = tuple(int(width) for width in flags.hidden.split(",") if width)
    except ValueError:
        hidden = (0,)
    if not all(width > 0 for width in hidden):
        raise UserError(
            f"--hidden={flags.hidden}: expected widths of hidden layers with commas between, such as 256,64"
        )
    rate = (3e-4 if hidden else 3e-3) if flags.learning_rate is None else flags.learning_rate
    if not 0 < rate < math.inf or not 0 <= flags.weight_decay < math.inf:
        raise UserError(
            f"--learning_rate={rate}, --weight_decay={flags.weight_decay}: expected finite numbers, the first above 0"
            " and the second not below"
        )
    output = flags.output.expanduser()
    if output.suffix != ".safetensors" or output.is_dir():
        raise UserError(f"--output={flags.output}: expected the name of a file that ends in .safetensors")
    check_output(output.parent)
    return bradley_terry.Settings(hidden, rate, flags.weight_decay, flags.batch_size, flags.num_epochs, flags.seed)


def count_of(source: preferences.Pairs, flags: argparse.Namespace) -> int:
    """How many pairs are read.

    Raises:
        UserError: the source is without end and no number is given, or it holds fewer.
    """
    if source.length is None and flags.num_pairs is None:
        raise UserError(f"--data={flags.data} gives pairs without end; give --num_pairs, such as 10000")
    if source.length is not None and flags.num_pairs is not None and flags.num_pairs > source.length:
        raise UserError(f"--num_pairs={flags.num_pairs}: --data={flags.data} holds {source.length}")
    return flags.num_pairs or source.length


def embed(
    found: clip.CLIP, source: preferences.Pairs, *, count: int, resolution: int, seed: int, chunk_size: int
) -> Comparisons:
    """What the CLIP makes of so many pairs, in an order that follows from `seed`; pictures are held a chunk at a time.

    Pictures go the way of those that the reward scores in a run: first they are cut and resized to `resolution`, the
    size that a model draws, and then as the CLIP wants them.
    """
    describe_images, embed_texts = jax.jit(found.describe_images), jax.jit(found.embed_texts)
    chunks, begin, told = [], time.monotonic(), time.monotonic()
    for i in range(math.ceil(count / chunk_size)):
        how = {"batch_size": chunk_size, "seed": seed, "epoch": i, "resolution": resolution, "horizontal_flip": False}
        batch = preferences.make_batch(source, **how)
        pictures = np.concatenate([batch.images[:, 0], batch.images[:, 1]])
        texts = embed_texts(found.params, found.tokenize(list(batch.prompts)))
        chunks.append((batch.prompts, describe_images(found.params, pictures), texts, batch.labels))
        if i:  # of the one before, while this one is under way
            chunks[i - 1] = _on_the_host(chunks[i - 1])
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{(i + 1) * chunk_size} of {count} pairs seen, {_pace(i * chunk_size, begin)}", flush=True)
    chunks[-1] = _on_the_host(chunks[-1])
    prompts, pictures, texts, labels = zip(*chunks, strict=True)
    print(f"{count} pairs of {resolution} pixels seen, {_pace(count, begin)}", flush=True)
    return Comparisons(
        tuple(prompt for chunk in prompts for prompt in chunk)[:count],
        np.concatenate(pictures)[:count],
        np.concatenate(texts)[:count],
        np.concatenate(labels)[:count],
    )


def figures_of(data: Comparisons, held: np.ndarray, fitted: Fitted) -> dict[str, int | float | str]:
    """What is told of a fit, and kept in its file."""
    unseen = bradley_terry.take(data, np.flatnonzero(held))
    picture, preferred = unseen.pictures[..., : unseen.texts.shape[1]], unseen.labels > 0.5
    cosines = (picture * unseen.texts[:, None]).sum(axis=2)
    by_prompt = len(set(data.prompts)) >= MIN_PROMPTS
    return {
        "pairs": int((~held).sum()),
        "held_out_pairs": int(held.sum()),
        "held_out_by": "prompt" if by_prompt else "pair",
        "held_out_prompts": len(set(unseen.prompts)),
        "accuracy": fitted.held_out.accuracy,
        "log_loss": fitted.held_out.log_loss,
        "confidence": fitted.held_out.confidence,
        "train_accuracy": fitted.trained.accuracy,
        "train_log_loss": fitted.trained.log_loss,
        "majority_accuracy": float(max(preferred.mean(), 1 - preferred.mean())),
        "clip_accuracy": bradley_terry.judge(cosines, unseen.labels).accuracy,
        "epoch": fitted.epoch,
        "epochs": fitted.num_epochs,
        "score_mean": fitted.mean,
        "score_std": fitted.std,
    }


def report(figures: dict[str, int | float | str]) -> None:
    """Prints the figures."""
    accuracy, pairs = figures["accuracy"], figures["held_out_pairs"]
    error = math.sqrt((accuracy * pairs + 2) * ((1 - accuracy) * pairs + 2) / (pairs + 4) ** 3)  # Agresti & Coull 1998
    whose = f"of {figures['held_out_prompts']} prompts that it has not seen"
    if figures["held_out_by"] == "pair":
        whose = f"held out one by one, as there are fewer than {MIN_PROMPTS} prompts"
    print(f"fitted on {figures['pairs']} pairs; of {figures['epochs']} epochs the best is {figures['epoch']}")
    print(f"held-out accuracy {accuracy:.1%} ± {error:.1%} on {pairs} pairs {whose}")
    print(
        f"  beside it: {figures['majority_accuracy']:.1%} by the commoner label, {figures['clip_accuracy']:.1%} by the"
        f" CLIP's own score, {figures['train_accuracy']:.1%} on the pairs that it was fitted on"
    )
    print(
        f"held-out log loss {figures['log_loss']:.3f}, where knowing nothing is {math.log(2):.3f}; it believes that it"
        f" is right in {figures['confidence']:.1%}"
    )
    if figures["log_loss"] >= math.log(2):
        print(
            "note: no better than chance: there are too few pairs, or this CLIP does not see what they are about",
            file=sys.stderr,
        )


def _on_the_host(chunk: tuple) -> tuple:
    prompts, described, texts, labels = chunk
    described = np.asarray(described)
    return prompts, np.stack(np.split(described, 2), axis=1), np.asarray(texts), labels


def _pace(count: int, begin: float) -> str:
    return f"{count / max(time.monotonic() - begin, 1e-9):.3g} a second"


if __name__ == "__main__":
    sys.exit(main())
