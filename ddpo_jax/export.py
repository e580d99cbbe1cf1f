"""Export a saved round of a run as a diffusers folder.

python -m ddpo_jax.export --checkpoint=WORKDIR[/checkpoints/STEP] --to=DIR [--dtype=float16] [--base=FOLDER]

A run's folder is its newest checkpoint. Adapters are merged into the weights, and written by themselves too, as
pytorch_lora_weights.safetensors, which diffusers' load_lora_weights reads. A running average, where the run kept one,
is what is exported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from ddpo_jax.command import add_base_flags, base_of, describe, run_command
from ddpo_jax.diffusers_folder import check_target
from ddpo_jax.errors import UserError
from ddpo_jax.models.locate import locate_pipeline
from ddpo_jax.models.stable_diffusion import Source
from ddpo_jax.saved import about, base_named, export_trained, find_checkpoint
from ddpo_jax.settings import make_finetune

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def main(argv: list[str] | None = None) -> int:
    return run_command(export_checkpoint, parser(), argv)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or checkpoints/STEP in it")
    parser.add_argument("--to", required=True, type=Path, help="the folder to write")
    add_base_flags(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of all weights; float32 by default")
    return parser


def export_checkpoint(flags: argparse.Namespace) -> None:
    """Writes the folder that the flags ask for.

    Raises:
        UserError: the checkpoint cannot be read, or something else is in the target's place.
    """
    found = find_checkpoint(flags.checkpoint, base=base_of(flags))
    if found is None:
        raise UserError(
            f"--checkpoint={flags.checkpoint}: expected a run's folder, with config.json and checkpoints in it, or"
            " checkpoints/STEP in one"
        )
    pretrained = found.config.pretrained
    with base_named():
        folder = locate_pipeline(pretrained.model, variant=pretrained.variant, revision=pretrained.revision)
    source, target = Source(folder, pretrained.variant), flags.to.expanduser()
    check_target(source, target)
    export_trained(
        source,
        target,
        make_finetune(found.config.train),
        found.trainable,
        about=about(found.config, name=found.workdir.absolute().name, epochs=found.step),
        dtype=DTYPES[flags.dtype],
    )
    print(f"{target}: round {found.step} of {found.workdir}, {flags.dtype}")


if __name__ == "__main__":
    sys.exit(main())
