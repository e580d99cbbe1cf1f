"""Bytes on a device that DDPO takes, by model, by what is trained and by what the backward pass keeps.

python -m benchmarks.memory --rows=sd15,sdxl --json=runs/memory.json
python -m benchmarks.memory --chip=v5e --rows=sd15:lora:products --micro_batch_size=4 --chunk_size=4

Compiles the very programs of a run (sampling, gradient, optimizer step) for an NVIDIA H100 or a TPU from shapes alone,
without weights and without the chip, and reads XLA's buffer assignment. What a program needs is what lives through it
(weights, training state, trajectories, gradients) and its temporary buffers; the peak is that of the program that needs
most. For a GPU, XLA is kept from rescuing a program that does not fit; not in it are CUDA's own memory (about 0.5 GB),
scratch space of convolutions, which cuDNN chooses on the device, and fragmentation. A TPU's compiler refuses what does
not fit; a program takes it minutes.

bfloat16 compute, float32 trained weights, AdamW with float32 moments, guidance.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run

import jax

from benchmarks.chips import on_chip
from benchmarks.programs import Program, abstract_run, read_model, size
from configs import base
from ddpo_jax.models.unet import REMAT
from ddpo_jax.sharding import make_layout

GB = 1e9

# XLA's own rematerialisation would hide what train.remat does. Without Triton no GPU is asked which of its kernels is
# fastest: matrix products are cuBLAS's, whose workspace is in the figures.
OPTIONS = {"h100": {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_enable_triton_gemm": False}}


class Row(NamedTuple):
    """Bytes."""

    model: str
    trains: str
    remat: str
    pixels: int
    chip: str
    attention: str
    micro_batch_size: int
    chunk_size: int
    frozen: int  # weights that are not trained
    state: int  # trained weights, their moments
    gradients: int
    trajectories: int
    sampling: int  # temporary
    update: int
    optimizer: int
    peak: int
    seconds: float  # of compiling


def measure(name: str, trains: str, remat: str, *, pixels: int, flags: argparse.Namespace) -> Row:
    """What one run needs."""
    begin, sharding = time.monotonic(), on_chip(flags.chip)
    layout = make_layout(devices=list(sharding.device_set))
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "compute_dtype": "bfloat16",
            "pretrained.resolution": pixels,
            "sample.num_steps": 50,
            "sample.num_prompts": flags.num_samples,
            "train.learning_rate": 3e-4,
            "train.lora_rank": 0 if trains == "full" else 4,
            "train.remat": remat,
            "attention": flags.attention,
        }
    )
    cut = {"chunk_size": flags.chunk_size, "micro_batch_size": flags.micro_batch_size}
    run = abstract_run(config, *read_model(config, name), layout=layout, **cut)

    def temporary(program: Program) -> int:
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.inputs)
        compiled = program.fn.lower(*placed).compile(compiler_options=OPTIONS.get(flags.chip))
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes

    sampling, gradient, optimizer = map(temporary, (run.sample, run.accumulate, run.apply))
    kept = {
        "frozen": size(run.frozen),
        "state": size(run.state),
        "gradients": size(run.accumulate.inputs[-1]),
        "trajectories": size(run.batch),
    }
    living = kept["frozen"] + kept["state"] + kept["trajectories"]
    peak = living + max(sampling, kept["gradients"] + max(gradient, optimizer))
    seconds = time.monotonic() - begin
    return Row(
        name,
        trains,
        remat,
        pixels,
        flags.chip,
        flags.attention,
        **cut,
        **kept,
        sampling=sampling,
        update=gradient,
        optimizer=optimizer,
        peak=peak,
        seconds=seconds,
    )


def table(rows: list[Row]) -> list[str]:
    """Markdown, in GB."""
    columns = ("frozen", "state", "gradients", "trajectories", "sampling", "update", "peak")
    names = (
        "frozen weights",
        "training state",
        "gradients",
        "trajectories",
        "sampling",
        "gradient program",
        "**peak**",
    )
    lines = [f"| {' | '.join(('model', 'trains', '`train.remat`', *names))} |", f"|{'---|' * (3 + len(names))}"]
    for row in rows:
        cells = [f"{getattr(row, column) / GB:.2f}" for column in columns]
        cells[-1] = f"**{cells[-1]}**"
        lines.append(f"| {' | '.join((f'{row.model}, {row.pixels} px', row.trains, row.remat, *cells))} |")
    return lines


PLANNED = {
    "sd15": [(trains, remat, 512) for trains in ("full", "lora") for remat in REMAT],
    "sdxl": [("lora", remat, 1024) for remat in REMAT],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="sd15,sdxl", help="models, with commas between; sd15:lora:blocks is one row")
    parser.add_argument("--chip", default="h100", help="h100, or a TPU: v5e, v6e, ...")
    parser.add_argument("--attention", default="xla", choices=("xla", "chunked"))
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows that a gradient program learns from")
    parser.add_argument("--chunk_size", type=int, default=1, help="pictures that a program draws")
    parser.add_argument("--num_samples", type=int, default=64, help="a round; their trajectories stay on the device")
    parser.add_argument("--json", type=Path, help="a file to write")
    flags = parser.parse_args()
    rows = []
    for wanted in flags.rows.split(","):
        name, *rest = wanted.split(":")
        chosen = [row for row in PLANNED.get(name, ()) if rest == list(row[: len(rest)])]
        if not chosen:
            parser.error(
                f"--rows={wanted}: expected one of {', '.join(PLANNED)}, with :full or :lora and a train.remat"
            )
        for trains, remat, pixels in chosen:
            rows.append(measure(name, trains, remat, pixels=pixels, flags=flags))
            print(table(rows)[-1], f"compiled in {rows[-1].seconds:.0f} s", flush=True)
    print("\n".join(["", *table(rows)]))
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
