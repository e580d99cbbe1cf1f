"""Score a folder of pictures with any reward, to try it alone.

python -m ddpo_jax.score --reward=clip_score --config.reward.clip_model=tiny --images=DIR --output=DIR
python -m ddpo_jax.score --reward=jpeg_compressibility,my_rewards:brightness --images=DIR --output=DIR

Reads PNG, JPEG, WebP, BMP and TIFF. Prompts come from metadata.jsonl in the folder (file_name, text), as
ddpo_jax.sample writes it, or from --prompt. Writes scores.csv, a row a picture, and scores.html, a page with the
pictures, best first. --reward is what a run's reward.name may be, and --config.reward.FIELD=VALUE sets what a scorer
is made with, such as clip_model, clip_template, deadline and num_workers, as for a run.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from ddpo_jax import rewards, runtime
from ddpo_jax.command import check_output, describe, run_command
from ddpo_jax.errors import UserError
from ddpo_jax.picture_folder import Entry, list_pictures, read_all
from ddpo_jax.report import scores as report
from ddpo_jax.scoring import FLAGS, make_prompts, read_settings, score_chunks, split_fields
from ddpo_jax.types import Prompts, PyTree, Reward
from ddpo_jax.workdir import write_atomically


class Chunk(NamedTuple):
    """Pictures of one size, scored together."""

    positions: list[int]  # of the first of them; the others fill up
    images: UInt8[np.ndarray, "b H W 3"]


def main(argv: list[str] | None = None) -> int:
    fields, others = split_fields(argv)
    return run_command(lambda flags: score(flags, fields), parser(), others, flag_of=FLAGS)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--reward", required=True, help="clip_score, jpeg_compressibility, module:function, ...; several with commas")
    add("--images", required=True, type=Path, help="the folder of pictures; folders in it are not looked into")
    add("--output", required=True, type=Path, help="the folder to write to, another one")
    add("--prompt", help="of all pictures, in place of metadata.jsonl's")
    add("--chunk_size", type=int, default=8, help="pictures of one size scored together, at most; 8 by default")
    add("--compilation_cache", default="~/.cache/ddpo_jax", help="folder of compiled programs; empty: none")
    return parser


def score(flags: argparse.Namespace, fields: Sequence[str]) -> None:
    """Scores and writes what the flags ask for. fields: flags of the form --config.reward.FIELD=VALUE.

    Raises:
        UserError: a flag, the reward, the pictures or the output folder cannot be used.
        RunStopped: the reward raised, or gave no scores in time.
    """
    settings = read_settings(fields)
    folder, output = flags.images.expanduser(), flags.output.expanduser()
    if flags.chunk_size < 1:
        raise UserError(f"--chunk_size={flags.chunk_size}: expected 1 or more")
    entries, absent = list_pictures(folder, flags.prompt)
    if output.resolve() == folder.resolve():
        raise UserError(f"--output={flags.output}: the pictures are in it; give another folder")
    check_output(output)
    if absent:
        note(f"{len(absent)} files that metadata.jsonl names are not there, such as {absent[0]!r}")
    without = sum(not entry.text for entry in entries)
    if without:
        note(f"{without} of {len(entries)} pictures have no prompt, and an empty one is scored; --prompt=TEXT gives it")
    runtime.set_up(flags.compilation_cache)
    reward, params = rewards.make(flags.reward, settings)
    begin = time.monotonic()
    values, reasons = score_all(reward, params, entries, chunk_size=flags.chunk_size, in_flight=settings.num_workers)
    seconds = time.monotonic() - begin
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "scores.csv", table(entries, reward.names, values, reasons))
    write_atomically(
        output / "scores.html", report.page_of(folder, entries, reward.names, values, reasons, seconds=seconds)
    )
    for name, column in zip(reward.names, values.T, strict=True):
        print(f"{name}: {summary(column)}")
    print(f"{output}: {len(entries)} pictures in {seconds:.1f} s, {len(entries) / seconds:.3g} a second")


def score_all(
    reward: Reward, params: tuple[PyTree, ...], entries: tuple[Entry, ...], *, chunk_size: int, in_flight: int
) -> tuple[Float32[np.ndarray, "n experts"], list[str]]:
    """The scores of each picture, NaN where there is none, and why there is none, as far as that is known.

    in_flight: chunks that are scored while others are read.
    """
    values = np.full((len(entries), len(reward.names)), np.nan, np.float32)
    reasons = [""] * len(entries)
    chunks = (
        (chunk.positions, len(chunk.positions), chunk.images, prompts_of(entries, chunk))
        for chunk in make_chunks(entries, reasons, chunk_size=chunk_size)
    )
    for positions, found, why in score_chunks(reward, params, chunks, in_flight=in_flight):
        values[positions] = found
        for i in np.flatnonzero(np.isnan(found).any(axis=1)):
            reasons[positions[i]] = why
    return values, reasons


def make_chunks(entries: tuple[Entry, ...], reasons: list[str], *, chunk_size: int) -> Iterator[Chunk]:
    """The pictures in chunks of one size; all of a size have the same number, so that one program serves them.

    Of those that cannot be read, the reason is put into `reasons` and told.
    """
    waiting: dict[tuple, list] = defaultdict(list)  # by shape
    seen: set[tuple] = set()  # shapes that had a full chunk
    for i, image, reason in read_all(entries):
        if image is None:
            reasons[i] = reason
            note(f"{entries[i].name}: {reason}")
            continue
        held = waiting[image.shape]
        held.append((i, image))
        if len(held) == chunk_size:
            seen.add(image.shape)
            yield _stack(waiting.pop(image.shape), chunk_size)
    for shape, held in waiting.items():
        yield _stack(held, chunk_size if shape in seen else len(held))


def prompts_of(entries: tuple[Entry, ...], chunk: Chunk) -> Prompts:
    """The chunk's prompts, for those that fill up too."""
    positions = _filled(chunk.positions, len(chunk.images))
    chosen = [entries[i] for i in positions]
    return make_prompts([entry.text for entry in chosen], np.asarray(positions), [entry.metadata for entry in chosen])


def table(
    entries: tuple[Entry, ...],
    names: Sequence[str],
    values: Float32[np.ndarray, "n experts"],
    reasons: Sequence[str],
) -> str:
    """scores.csv: a row a picture, scores in the shortest form that is the same float32, empty where missing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file_name", "prompt", *names, "missing_because"])
    for entry, row, reason in zip(entries, values, reasons, strict=True):
        scores = ["" if np.isnan(value) else str(value) for value in row]
        writer.writerow([entry.name, entry.text, *scores, reason])
    return file.getvalue()


def summary(column: Float32[np.ndarray, " n"]) -> str:
    """One line on an expert's scores."""
    found = report.summary_of(column)
    if not found.count:
        return f"no score, {found.missing} missing"
    missing = f", {found.missing} missing" if found.missing else ""
    spread = f"{found.mean:.4g} ± {found.std:.2g}, from {found.lowest:.4g} to {found.highest:.4g}"
    return f"{spread}, of {found.count} pictures{missing}"


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _stack(held: list[tuple[int, np.ndarray]], count: int) -> Chunk:
    positions = [i for i, _ in held]
    return Chunk(positions, np.stack(_filled([image for _, image in held], count)))


def _filled(items: list, count: int) -> list:
    return items + [items[-1]] * (count - len(items))


if __name__ == "__main__":
    sys.exit(main())
