"""Pairs a second of Diffusion-DPO on the embedded model, with what the VAE makes of pictures kept and without, and with
the next round's pictures read ahead and without.

python -m benchmarks.latent_cache --pairs=96 --batch=32 --folder=runs/latent_cache

Makes a folder of pairs of JPEGs of 512 px, which are read at the 64 of the embedded model. The four ways take turns,
block by block; a block's first round, whose data nobody read ahead, and its last, beside which nothing is read, are not
counted, nor are those that fill the cache.
Prints a JSON line a way: medians over its rounds of pairs a second, of the CPU seconds of all threads, and of the
seconds that a round waits for its data and that its encoding takes. On a CPU a thread that reads ahead takes its
seconds from the training; it is worth them where a GPU trains.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.read_pairs import pictures
from benchmarks.rounds import begin, collect, learn
from configs import quick_dpo
from ddpo_jax.ahead import one_ahead
from ddpo_jax.build import Run
from ddpo_jax.tiny.render import PROMPTS

PIXELS = 512
BLOCKS, ROUNDS = 3, 3  # of each way, and counted of each block


class Seconds(NamedTuple):
    """Of one round."""

    all: float
    cpu: float  # of all threads
    waiting: float  # for the data
    encoding: float


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", type=Path, required=True, help="a new one, for what is written")
    flags = parser.parse_args(argv)
    flags.folder.mkdir(parents=True)
    try:
        write_pairs(flags.folder / "pairs", flags.pairs)
        ways = {
            f"{'cached' if cache else 'live'}, {'read ahead' if ahead else 'read in turn'}": (play, ahead)
            for cache, play in ((name, player(flags, name)) for name in ("", str(flags.folder / "cache")))
            for ahead in (False, True)
        }
        told = {name: [] for name in ways}
        for _ in range(BLOCKS):
            for name, (play, ahead) in ways.items():
                told[name] += play(ahead)
        for name, rounds in told.items():
            medians = {
                field: round(statistics.median(getattr(one, field) for one in rounds), 3) for field in Seconds._fields
            }
            print(json.dumps({"way": name, "pairs_per_s": round(flags.batch / medians["all"], 2), **medians}))
        print(json.dumps({"rounds": BLOCKS * ROUNDS, "processors": os.cpu_count(), "load": os.getloadavg()[0]}))
    finally:
        shutil.rmtree(flags.folder)


def write_pairs(folder: Path, count: int) -> None:
    """Pairs of JPEGs, each file its own."""
    folder.mkdir()
    stock = list(islice(pictures(PIXELS), 32))
    rows = []
    for i in range(count):
        row = {"prompt": PROMPTS[i % len(PROMPTS)], "label": i % 2}
        for side in range(2):
            row[f"image_{side}"] = f"{i}-{side}.jpg"
            (folder / row[f"image_{side}"]).write_bytes(stock[(7 * i + side) % len(stock)] + f"{i}-{side}".encode())
        rows.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows))


def player(flags: argparse.Namespace, cache: str) -> Callable[[bool], list[Seconds]]:
    """A function: ahead -> the seconds of a block's rounds, of a run that goes on from block to block."""
    config = quick_dpo.get_config()
    changes = {
        "data.source": str(flags.folder / "pairs"),
        "data.batch_size": flags.batch,
        "data.cache": cache,
        "train.num_updates": 1,
        "eval_prompts": 2,
        "mesh.data": 1,
    }
    config.update_from_flattened_dict(changes)
    ready = begin(config)

    def play(ahead: bool, rounds: int = ROUNDS + 2) -> list[Seconds]:
        """The seconds of the rounds between the first, whose data nobody read ahead, and the last."""
        nonlocal ready
        first, told = int(ready.state.epoch), []
        epochs = range(first, first + rounds)
        with one_ahead(ready.run.draw, epochs) if ahead else in_turn(ready.run, epochs) as take:
            for _ in epochs:
                begun, cpu = time.monotonic(), time.process_time()
                inputs = take()
                there = time.monotonic()
                batch, ready = collect(ready, inputs)
                encoded = time.monotonic()
                ready = learn(ready, batch)
                end = time.monotonic()
                told.append(Seconds(end - begun, time.process_time() - cpu, there - begun, encoded - there))
        return told[1:-1]

    play(False, -(-flags.pairs // flags.batch) + 1)  # compiles, and fills the cache
    return play


def in_turn(run: Run, epochs: range):
    """`one_ahead` without a thread."""
    waiting = iter(epochs)
    return nullcontext(lambda: run.draw(next(waiting)))


if __name__ == "__main__":
    main()
