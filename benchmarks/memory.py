"""Bytes on a device that DDPO takes, by model, by what is trained and by what the backward pass keeps.

python -m benchmarks.memory --rows=sd15,sdxl --json=runs/memory.json

Compiles the very programs of a run (sampling, gradient, optimizer step) for an NVIDIA H100 from shapes alone, without
weights and without a GPU, and reads XLA's buffer assignment. What a program needs is what lives through it (weights,
training state, trajectories, gradients) and its temporary buffers; the peak is that of the program that needs most. XLA
is kept from rescuing a program that does not fit. Not in it: CUDA's own memory (about 0.5 GB), scratch space of
convolutions, which cuDNN chooses on the device, and fragmentation.

bfloat16 compute, float32 trained weights, AdamW with float32 moments, guidance, micro-batches of one row.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.families import FAMILIES, SCHEDULER, read_configs
from benchmarks.gpu import h100
from ddpo_jax import finetune, optimizers, process
from ddpo_jax.advantages import whiten
from ddpo_jax.algorithms import ddpo
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.models.stable_diffusion import make_model, stored
from ddpo_jax.models.unet import REMAT
from ddpo_jax.policy import make_policy, make_sampler
from ddpo_jax.sharding import make_layout
from ddpo_jax.types import Frozen, TrainState, Trajectory
from ddpo_jax.update import MicroBatch, make_update

GB = 1e9
NUM_STEPS = 50
RANK = 4

# XLA's own rematerialisation would hide what train.remat does. Without Triton no GPU is asked which of its kernels is
# fastest: matrix products are cuBLAS's, whose workspace is in the figures.
OPTIONS = {"xla_disable_hlo_passes": "rematerialization", "xla_gpu_enable_triton_gemm": False}


class Row(NamedTuple):
    """Bytes."""

    model: str
    trains: str
    remat: str
    pixels: int
    frozen: int  # weights that are not trained
    state: int  # trained weights, their moments
    gradients: int
    trajectories: int
    sampling: int  # temporary
    update: int
    optimizer: int
    peak: int
    seconds: float  # of compiling


def measure(name: str, trains: str, remat: str, *, pixels: int, num_samples: int, sharding: Any) -> Row:
    """What one run needs."""
    begin = time.monotonic()
    layout = make_layout(devices=list(sharding.device_set))
    configs = read_configs(name)
    noise = process.ddim(process.noise_schedule(SCHEDULER | {"prediction_type": FAMILIES[name].prediction_type}))
    model = make_model(configs, noise, dtype=jnp.bfloat16, resolution=pixels, remat=remat)
    policy = make_policy(model, num_steps=NUM_STEPS, eta=1.0, guidance_scale=5.0)
    tuning = finetune.full() if trains == "full" else finetune.lora(rank=RANK, alpha=float(RANK))
    algorithm = ddpo.importance_sampling(
        Parts(model, policy, None, None, None, layout, 1),
        scoring=ddpo.Scoring(whiten(), np.ones(1, np.float32), adv_clip_max=5.0, max_missing=0.1),
        num_updates=4,
        clip_range=1e-4,
        old_log_prob="recompute",
        kl_weight=0.0,
        kl_budget=0.0,
        min_timestep=0,
    )
    tx = optimizers.make(
        "adamw",
        learning_rate=3e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        moment_dtype="float32",
        weight_decay=1e-4,
        max_grad_norm=1.0,
        num_warmup_steps=0,
        num_decay_steps=0,
    )
    update = make_update(algorithm, tuning, tx, ema_decay=0.0, layout=layout)

    shapes = stored(configs, jnp.bfloat16, exact=tuning.changes)
    denoiser, vae, text = shapes["unet"], shapes["vae"], {part: shapes[part] for part in configs.text}
    tokens = jnp.zeros((1, 77 * len(text)), jnp.int32)
    cond = jax.eval_shape(model.encode_text, text, tokens)
    frozen = Frozen(text, denoiser if tuning.reads_pretrained else None, vae, cond, ())
    params = jax.eval_shape(tuning.init, jax.random.key(0), denoiser)
    state = TrainState(None, jnp.zeros((), jnp.int32), params, None, jax.eval_shape(tx.init, params), None, None)
    batch = jax.eval_shape(lambda: rollouts(cond, model.latent_shape, num_samples))
    micro_batch = MicroBatch(np.zeros((1, 2), np.int32), np.ones(1, np.float32))
    key = jax.random.key(0)
    total = jax.eval_shape(update.zero, params, frozen, batch, micro_batch, key)
    sampler = make_sampler(model, policy, tuning.merge, layout=layout)

    def temporary(program, *inputs) -> int:
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
        compiled = program.lower(*placed).compile(compiler_options=OPTIONS)
        found = compiled.memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes

    sampling = temporary(sampler, params, frozen, tokens, jax.random.split(key, 1))
    gradient = temporary(update.accumulate, params, frozen, batch, micro_batch, key, total)
    optimizer = temporary(update.apply, state, total)
    kept = {"frozen": size(frozen), "state": size(state), "gradients": size(total), "trajectories": size(batch)}
    living = kept["frozen"] + kept["state"] + kept["trajectories"]
    peak = living + max(sampling, kept["gradients"] + max(gradient, optimizer))
    seconds = time.monotonic() - begin
    return Row(
        name,
        trains,
        remat,
        pixels,
        **kept,
        sampling=sampling,
        update=gradient,
        optimizer=optimizer,
        peak=peak,
        seconds=seconds,
    )


def rollouts(cond: Any, latent_shape: tuple[int, ...], count: int) -> ddpo.Rollouts:
    """A round's samples, as the update reads them."""
    trajectory = Trajectory(
        t=jnp.zeros((count, NUM_STEPS + 1)),
        x=jnp.zeros((count, NUM_STEPS + 1, *latent_shape)),
        log_prob=jnp.zeros((count, NUM_STEPS)),
        trained=jnp.ones((count, NUM_STEPS), bool),
    )
    conds = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), cond)
    return ddpo.Rollouts(conds, trajectory, jnp.zeros(count), jnp.ones(count))


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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
    parser.add_argument("--num_samples", type=int, default=64, help="a round; their trajectories stay on the device")
    parser.add_argument("--json", type=Path, help="a file to write")
    flags = parser.parse_args()
    sharding, rows = h100(), []
    for wanted in flags.rows.split(","):
        name, *rest = wanted.split(":")
        for trains, remat, pixels in PLANNED[name]:
            if rest and rest != [trains, remat][: len(rest)]:
                continue
            rows.append(measure(name, trains, remat, pixels=pixels, num_samples=flags.num_samples, sharding=sharding))
            print(table(rows)[-1], f"compiled in {rows[-1].seconds:.0f} s", flush=True)
    print("\n".join(["", *table(rows)]))
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
