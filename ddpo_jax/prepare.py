"""Make a data set of comparisons or of captioned pictures that training reads fast, from files of other forms.

python -m ddpo_jax.prepare --from=pick_a_pic --input='pick_a_pic/data/train-*.parquet' --output=data/pick_a_pic
python -m ddpo_jax.prepare --from=pairs --input=runs/online/pairs --output=data/online
python -m ddpo_jax.prepare --from=choices --input=choices.jsonl --output=data/choices
python -m ddpo_jax.prepare --from=captioned --input=pictures --output=data/pictures

pick_a_pic  parquet files with the columns of Pick-a-Pic v2 (caption, jpg_0, jpg_1, label_0, and label_1 and has_label
            where they are there), filtered as published: ties and rows without a label are left out
pairs       a folder with pairs*.jsonl, a line {"prompt": TEXT, "image_0": FILE, "image_1": FILE, "label": NUMBER}:
            label is how surely image_0 is the better one, from 0 to 1; a run writes its own pairs so, too
choices     a JSONL file, a line {"prompt": TEXT, "image_0": FILE, "image_1": FILE, "choice": CHOICE}, or "images": a
            list of two files; CHOICE is 0 or 1, "image_0" or "image_1", "first" or "second", "left" or "right", "a" or
            "b", or the chosen file's name; null, "", "tie", "equal", "both", "neither" and "none" are ties, left out
captioned   a folder with metadata.jsonl, a line {"file_name": FILE, "text": TEXT}

Files are named relative to the folder of the JSONL file that names them. Every picture is decoded once. A row with a
broken or oversized picture, a bad label or text that is not UTF-8 is left out, counted and told in skipped.jsonl, with
its file and its row from 0. JPEG and PNG files of upright 8-bit RGB are kept as they are; others become PNG files.

A conversion that was cut off goes on where the same command is given again, and gives the same files as one that was
not. Give the folder to training as data.source; tensorflow_datasets.builder_from_directory opens it, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ddpo_jax.command import check_output, describe, run_command
from ddpo_jax.datasets.folders import open_captioned, open_choices, open_pairs
from ddpo_jax.datasets.images import MAX_PIXELS
from ddpo_jax.datasets.pick_a_pic import open_pick_a_pic
from ddpo_jax.datasets.writing import SKIPPED, Plan, convert
from ddpo_jax.errors import UserError

SOURCES = {
    "pick_a_pic": open_pick_a_pic,
    "pairs": open_pairs,
    "choices": open_choices,
    "captioned": open_captioned,
}


def main(argv: list[str] | None = None) -> int:
    return run_command(prepare, parser(), argv)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--from", required=True, choices=tuple(SOURCES), dest="form", help="the input's form")
    add("--input", required=True, help="a folder, a file, or (pick_a_pic) a pattern of files")
    add("--output", required=True, type=Path, help="the folder to write to: a new one, or of the same command before")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="processes; one a processor by default")
    add("--max_pixels", type=int, default=MAX_PIXELS, help="of a picture; larger ones are left out; 2^24 by default")
    add("--shard_size", type=int, default=1000, help="rows of the input that make one file; 1000 by default")
    add(
        "--resolution",
        type=int,
        help="cut to squares and resize to so many pixels, as JPEG of quality 95; off by default",
    )
    return parser


def prepare(flags: argparse.Namespace) -> None:
    """Converts what the flags ask for, and says what became of it.

    Raises:
        UserError: a flag, the input or the output cannot be used.
        RunStopped: a worker failed.
    """
    for name in ("num_workers", "max_pixels", "shard_size", "resolution"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more")
    output = flags.output.expanduser()
    check_output(output)
    source = SOURCES[flags.form](flags.input)
    plan = Plan(source, flags.shard_size, flags.max_pixels, flags.resolution)
    outcome = convert(plan, output, num_workers=flags.num_workers, report=_report)
    print(f"{output}: {outcome.kept} records in {outcome.num_shards} shards")
    if outcome.skipped:
        print(f"left out {outcome.skipped.total()} rows (see {output / SKIPPED}):")
        for reason, count in sorted(outcome.skipped.items()):
            print(f"  {count} {reason}")


def _report(done: int, shards: int) -> None:
    print(f"{done} of {shards} shards", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
