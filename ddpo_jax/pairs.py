"""Draw pairs of pictures with a model and let a reward prefer one: a folder to learn preferences from.

python -m ddpo_jax.pairs --model=tiny --prompts=common_animals --reward=clip_score --num_pairs=2000 --output=DIR

Of the --num_samples pictures of a prompt the best and the worst make a pair; where they are worth the same, or have no
score, another prompt is drawn. Writes the pictures, settings.json and, last, pairs.jsonl: a line is {"prompt",
"image_0", "image_1", "label"} and the rewards, label 1 where image_0 is the better one, 0 where image_1 is. Which of
them is, is random. --labels=flipped prefers the others and --labels=shuffled deals the labels out anew, of the same
pictures: controls. Several rewards are added with --weights, of 1 by default.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpo_jax import experts, preferences, prompt_flags, runtime, sampling, saved, scoring, starts
from ddpo_jax.command import base_of, check_output, describe, run_command
from ddpo_jax.data import PromptSet
from ddpo_jax.drawn import is_embedded, try_out
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.image_text import walk
from ddpo_jax.report.told import public
from ddpo_jax.types import Prompts
from ddpo_jax.workdir import write_atomically

FLAGS = sampling.FLAGS | scoring.FLAGS | prompt_flags.FLAGS
LABELS = ("reward", "flipped", "shuffled")
PATIENCE = 4, 64  # so many draws a pair, and so many more, and then they are no pairs


class Found(NamedTuple):
    """The best and the worst picture of a draw; in any order."""

    prompt: str
    images: tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]]
    values: tuple[float, float]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    fields, others = scoring.split_fields(argv)
    line = starts.command(argv, "pairs")
    return run_command(lambda flags: make_pairs(flags, fields, line), parser(), others, flag_of=FLAGS)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a diffusers folder, a hub id, tiny, a run's folder, or checkpoints/STEP in it")
    add("--reward", required=True, help="clip_score, jpeg_compressibility, module:function, ...; several with commas")
    add("--weights", default="", help="of several rewards, with commas between; 1 for each by default")
    add("--output", required=True, type=Path, help="the folder to write to, without pairs in it")
    prompt_flags.add_prompt_flags(parser)
    add("--num_pairs", type=int, default=2000, help="2000 by default")
    add("--num_samples", type=int, default=2, help="pictures of a prompt, of which two make a pair; 2 by default")
    add("--labels", default="reward", choices=LABELS, help="reward by default; the others are controls")
    sampling.add_sampling_flags(parser, chunk_size=16)
    return parser


def make_pairs(flags: argparse.Namespace, fields: Sequence[str], line: str = "") -> None:
    """Draws, scores and writes what the flags ask for. fields: flags --config.reward.FIELD=VALUE.  line: the command.

    Raises:
        UserError: a flag, the model, the reward or the output folder cannot be used.
        RunStopped: the reward gave no scores in time, or prefers too few pictures.
    """
    output = flags.output.expanduser()
    check(flags, output)
    runtime.set_up(flags.compilation_cache)
    loaded = saved.load(flags.model, dtype=flags.compute_dtype, resolution=flags.resolution, base=base_of(flags))
    configs = [loaded.config] if loaded.config else []
    origin, prompts = prompt_flags.read_prompts(flags, configs)
    settings = sampling.settings_of(flags, configs)
    reward, params, made_with = scoring.make_reward(flags.reward, fields, configs, embedded=is_embedded(loaded))
    combine = make_combine(reward.names, flags.weights)
    sampling.tell_too_long(loaded, prompts.texts)
    few = prompt_flags.spread(prompts, num_prompts=2, num_images=1)
    try_out(reward, params, few, loaded)

    begin, counts = time.monotonic(), Counter()
    draw = sampling.make_draw(loaded, settings, seed=flags.seed)
    drawn = chunks(draw, prompts, seed=flags.seed, num_samples=flags.num_samples, chunk_size=flags.chunk_size)
    scored = scoring.score_chunks(reward, params, drawn, in_flight=made_with.num_workers)
    found = preferred(scored, combine, counts, num_samples=flags.num_samples, num_pairs=flags.num_pairs)
    output.mkdir(parents=True, exist_ok=True)
    rows = write_pictures(output, found, seed=flags.seed, num_pairs=flags.num_pairs)
    seconds = time.monotonic() - begin
    told = {
        **{"model": public(flags.model), "prompts": origin, "num_samples": flags.num_samples, **settings._asdict()},
        **{"seed": flags.seed, "compute_dtype": flags.compute_dtype, "weights": flags.weights, "labels": flags.labels},
        **{"reward": ",".join(reward.names), "ties": counts["ties"], "without_scores": counts["missing"]},
        **{"seconds": round(seconds, 1), "command": line, **starts.environment()},
    }
    write_atomically(output / "settings.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    lines = (json.dumps(row) + "\n" for row in relabelled(rows, flags.labels, seed=flags.seed))
    write_atomically(output / "pairs.jsonl", "".join(lines))
    skipped = f"; left out: {counts['ties']} draws that are ties, {counts['missing']} without scores"
    print(f"{output}: {len(rows)} pairs in {seconds:.1f} s{skipped if counts else ''}")


def check(flags: argparse.Namespace, output: Path) -> None:
    """Raises UserError for what can be told before the model is there."""
    sampling.check_sampling_flags(flags, "num_pairs", "num_samples")
    if flags.num_samples < 2:
        raise UserError(f"--num_samples={flags.num_samples}: expected 2 or more, of which two make a pair")
    check_output(output)
    if output.is_dir() and any(output.glob(preferences.FILES)):
        raise UserError(f"--output={flags.output}: there are pairs in it; give another folder")


def make_combine(names: Sequence[str], weights: str) -> Callable:
    """scores (b, experts) -> rewards (b,): their weighted sum. weights: numbers with commas between; "" is 1 for each.

    Raises:
        UserError: there is not one number an expert.
    """
    try:
        numbers = np.array([float(x) for x in weights.split(",")] if weights else [1.0] * len(names), np.float32)
    except ValueError:
        numbers = np.zeros(0, np.float32)
    if len(numbers) != len(names) or not np.isfinite(numbers).all() or not numbers.any():
        raise UserError(f"--weights={weights}: expected a number for each of {', '.join(names)}, not all of them 0")
    return lambda scores: experts.weighted_sum(scores, numbers)


def chunks(
    draw: Callable, prompts: PromptSet, *, seed: int, num_samples: int, chunk_size: int
) -> Iterator[tuple[Any, int, UInt8[np.ndarray, "b H W 3"], Prompts]]:
    """Draws without an end, for `score_chunks`: `num_samples` pictures of each prompt in a row, in 8 bits.

    Prompts come in passes, each shuffled anew; what draw k is does not depend on the chunks. A reward sees the pictures
    as their files have them.

    Raises:
        UserError: a picture is not finite.
    """
    num_draws = max(1, chunk_size // num_samples)
    for number in itertools.count():
        ids = np.repeat(walk(len(prompts.texts), batch_size=num_draws, seed=seed, epoch=number), num_samples)
        texts = [prompts.texts[i] for i in ids]
        images = np.asarray(draw(texts, number * len(ids) + np.arange(len(ids))))
        if not np.isfinite(images).all():
            raise UserError("the model drew pictures that are not finite; try --compute_dtype=float32")
        pixels = sampling.as_bytes(images)
        told = scoring.make_prompts(texts, ids, [prompts.metadata[i] for i in ids])
        yield (texts, pixels), len(ids), pixels, told


def preferred(
    scored: Iterator, combine: Callable, counts: Counter, *, num_samples: int, num_pairs: int
) -> Iterator[Found]:
    """The best and the worst picture of each draw that has two different rewards; `counts` counts the others.

    Raises:
        RunStopped: they are too many.
    """
    num_draws = num_found = 0
    for (texts, pixels), scores, why in scored:
        values = combine(scores).reshape(-1, num_samples)
        for k, own in enumerate(values):
            num_draws += 1
            order = np.argsort(own)[: np.isfinite(own).sum()]  # NaN comes last
            if len(order) < 2 or own[order[0]] == own[order[-1]]:
                counts["missing" if len(order) < 2 else "ties"] += 1
                continue
            first, last = sorted((order[0], order[-1]))
            num_found += 1
            yield Found(
                texts[k * num_samples],
                (pixels[k * num_samples + first], pixels[k * num_samples + last]),
                (float(own[first]), float(own[last])),
            )
        if num_draws > PATIENCE[0] * num_pairs + PATIENCE[1]:
            raise RunStopped(
                f"{num_draws} draws gave {num_found} pairs: {counts['ties']} ties, {counts['missing']} without scores"
                f"{f' ({why})' if why else ''}; give a reward that tells pictures apart"
            )


def write_pictures(output: Path, found: Iterator[Found], *, seed: int, num_pairs: int) -> list[dict[str, Any]]:
    """Writes the first `num_pairs` as PNG files; the rows of pairs.jsonl, labelled as the reward has it.

    Which picture comes first is random.
    """
    rows: list[dict[str, Any]] = []
    turned = np.random.default_rng((seed, 0)).random(num_pairs) < 0.5
    for i, pair in enumerate(itertools.islice(found, num_pairs)):
        sides = (1, 0) if turned[i] else (0, 1)
        names = [f"{i:05d}-{side}.png" for side in range(2)]
        for name, side in zip(names, sides, strict=True):
            Image.fromarray(pair.images[side]).save(output / name)
        values = [pair.values[side] for side in sides]
        label = float(values[0] > values[1])
        row = {"prompt": pair.prompt, "image_0": names[0], "image_1": names[1], "label": label}
        rows.append({**row, "reward_0": values[0], "reward_1": values[1]})
        if (i + 1) % max(1, num_pairs // 10) == 0 and num_pairs >= 100:
            print(f"{i + 1} of {num_pairs} pairs", file=sys.stderr)
    return rows


def relabelled(rows: list[dict[str, Any]], labels: str, *, seed: int) -> list[dict[str, Any]]:
    """The rows with the labels that --labels names."""
    own = [row["label"] for row in rows]
    given = {
        "reward": own,
        "flipped": [1 - label for label in own],
        "shuffled": np.random.default_rng((seed, 1)).permutation(own).tolist(),
    }[labels]
    return [row | {"label": label} for row, label in zip(rows, given, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
