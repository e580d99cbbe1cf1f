"""What a run would take on machines that are not here: bytes, FLOPs and collectives a device, seconds and efficiency.

python -m benchmarks.plan --config=configs/sdxl.py --model=sdxl --mesh=32x1x2 --chip=v5e [--config.train.lora_rank=8]

Compiles the very programs of the run (sampling a chunk, the gradient of a micro-batch, an optimizer step) for simulated
devices, arranged as --mesh (data x fsdp x tensor) says, from shapes alone, and predicts a round from them:

- FLOPs and collectives are those of the program of one device after XLA's partitioner. Its dtypes are the program's. A
  backend may then combine collectives, and make a reduce-scatter of an all-reduce of which a device reads a part: half
  the bytes, so that with fsdp the time is an upper bound.
- Weights, training state and trajectories are exact. Activations are estimated (benchmarks/liveness.py says how well),
  as if attention and feed-forward were not cut over `tensor`: an upper bound there.
- Seconds of a program: its FLOPs at --utilisation of the chip's peak, or its inputs and outputs read or written once at
  the memory's speed, whichever is more; and then its collectives, none of which is taken to overlap with it. These go
  around a ring (Patarasuk & Yuan 2009): 2 (n-1)/n of the bytes for an all-reduce, (n-1)/n for a gather, inside a
  machine or slice first, then each device's part across. Latency, rewards and the host are left out.
- Other numbers of devices are not compiled: `data` grows or shrinks, and with it the groups that span it. What is sent
  for a row grows with the rows of a program; what is sent for a parameter does not. The numbers of the config are those
  of the whole run, so that at some count shards have less to do than a program holds, and efficiency falls.

Efficiency is samples a second and device, against the fewest devices that a run fits on.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from functools import cache, partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run

import jax
from ml_collections import ConfigDict

from benchmarks import hlo, liveness, programs
from benchmarks.families import FAMILIES
from benchmarks.predict import CHIPS, Compiled, Mesh, Prediction, cut, memory, predict
from ddpo_jax.command import EXIT_USER_ERROR, describe, fail, quieten
from ddpo_jax.config import parse
from ddpo_jax.errors import UserError
from ddpo_jax.process import choose
from ddpo_jax.sharding import make_layout

GB, TERA = 1e9, 1e12
MOST = 256  # devices


def read_mesh(text: str) -> Mesh:
    """Raises UserError if it is not DATAxFSDPxTENSOR, with two or more along `data`."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"--mesh={text}: expected data x fsdp x tensor, as in 8x1x1")
    mesh = Mesh(*map(int, text.split("x")))
    if mesh.data < 2 or mesh.size > 4 * MOST:
        raise UserError(
            f"--mesh={text}: expected 2 or more along data, which the plan is scaled by, and at most {4 * MOST} devices"
        )
    return mesh


def compile_all(config: ConfigDict, model: tuple, mesh: Mesh) -> Compiled:
    """The programs of a run on this mesh of simulated devices.

    Raises:
        UserError: the config cannot be used, or an axis of the mesh cuts nothing.
    """
    programs.check_samples(config)
    layout = make_layout(**mesh._asdict(), devices=jax.devices()[: mesh.size])
    once = cut(config, mesh, recomputes=False)
    sizes = {"chunk_size": once.rows["sample"], "micro_batch_size": once.rows["accumulate"]}
    run = programs.abstract_run(config, *model, layout=layout, **sizes)
    denoiser = run.state.params if run.frozen.denoiser is None else run.frozen.denoiser
    whole = {}
    for axis in ("fsdp", "tensor"):
        fewer = mesh._replace(data=1, **{axis: 1})
        uncut = make_layout(**fewer._asdict(), devices=jax.devices()[: fewer.size])
        whole[axis] = programs.size(programs.place(denoiser, uncut))
    for axis, num_bytes in whole.items():
        if getattr(mesh, axis) > 1 and num_bytes == programs.size(denoiser):
            raise UserError(f"--mesh: no parameter can be cut into {axis}={getattr(mesh, axis)} equal parts")
    work = {}
    for name in once.rows:
        begin, program = time.monotonic(), getattr(run, name)
        work[name] = hlo.work(hlo.partitioned(program.fn.lower(*program.inputs)))
        print(f"compiled {name} in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    made = {"sample": 0, "accumulate": programs.size(run.grads), "apply": programs.size(run.state)}
    state = run.state
    return Compiled(
        mesh=mesh,
        round=cut(config, mesh, recomputes=run.recomputes),
        work=work,
        traffic={name: programs.size(getattr(run, name).inputs) + made[name] for name in made},
        held={
            "frozen weights": programs.size(run.frozen),
            "parameters": programs.size((state.params, state.ema)),
            "optimizer": programs.size(state.opt_state),
            "gradients": programs.size(run.grads),
            "gathered weights": whole["fsdp"] - programs.size(denoiser),
        },
        sample=programs.size(run.batch) * mesh.num_shards // run.batch.trajectory.t.shape[0],
        activations=cache(partial(activations, config, model)),
        recomputes=run.recomputes,
    )


def activations(config: ConfigDict, model: tuple, name: str, rows: int) -> int:
    """Bytes that a program needs beside its inputs, for so many rows on a device that has all weights."""
    layout = make_layout(devices=jax.devices()[:1])
    run = programs.abstract_run(config, *model, layout=layout, chunk_size=rows, micro_batch_size=rows)
    program = getattr(run, name)
    traced = program.fn.trace(*program.inputs)
    donated = [given.donated for given in jax.tree.leaves(traced.args_info)]
    return liveness.peak_bytes(traced.jaxpr.jaxpr, donated=donated)


def report(compiled: Compiled, predictions: dict[str, list[Prediction]], utilisation: float) -> list[str]:
    """Markdown."""
    mesh, one, work = compiled.mesh, compiled.round, compiled.work
    recomputed = f", and {one.recomputed} calls of accumulate for old log-probs" if one.recomputed else ""
    call = {
        "sample": f"pictures a shard: {one.rows['sample']}",
        "accumulate": f"(sample, timestep) rows a shard: {one.rows['accumulate']}",
        "apply": "the optimizer",
    }
    lines = [
        f"Compiled for {mesh.size} devices, {mesh.data} x {mesh.fsdp} x {mesh.tensor}. A round: the sampling of"
        f" {one.num_samples} pictures, {one.num_steps} optimizer steps{recomputed}. A step is either. On a device:",
        "",
        *_table(
            ["program", "a call", "TFLOP a call", "calls a step", "TFLOP a step"],
            [
                [
                    name,
                    call[name],
                    _told(done.flops / TERA),
                    one.calls[name],
                    _told(done.flops * one.calls[name] / TERA),
                ]
                for name, done in work.items()
            ],
        ),
        "",
        *_table(
            ["program", "collective", "devices", "dtype", "times a call", "MB a call", "GB a step"],
            _collectives(compiled),
        ),
        "",
        *_table(["memory", "GB"], [[name, f"{size / GB:.2f}"] for name, size in memory(compiled, one, mesh).items()]),
    ]
    for name, rows in predictions.items():
        lines += ["", f"{name}, at {utilisation:.0%} of its peak:", "", *_scaling(rows)]
    return lines


def _collectives(compiled: Compiled) -> list[list]:
    """Those of one kind, group and dtype together; less than a megabyte a call is left out."""
    found: dict[tuple, list[float]] = {}
    for name, work in compiled.work.items():
        for one in work.collectives:
            for array in one.result if len(one.group) > 1 else ():
                sums = found.setdefault((name, one.kind, len(one.group), array.dtype), [0, 0])
                sums[0], sums[1] = sums[0] + one.count, sums[1] + one.count * array.num_bytes
    return [
        [*key, times, _told(size / 1e6), _told(size * compiled.round.calls[key[0]] / GB)]
        for key, (times, size) in found.items()
        if size >= 1e6
    ]


def _scaling(rows: Sequence[Prediction]) -> list[str]:
    best = next((row.samples_per_second / row.devices for row in rows if row.fits), None)
    header = ["devices", "GB", "fits", "sampling, s", "optimizer step, s", "round, s", "of it collectives, s"]
    return _table(
        [*header, "samples/s", "efficiency"],
        [
            [
                row.devices,
                f"{row.num_bytes / GB:.1f}",
                "yes" if row.fits else "no",
                *map(_told, (row.sampling, row.step, row.round, row.collectives, row.samples_per_second)),
                f"{row.samples_per_second / row.devices / best:.0%}" if row.fits else "–",
            ]
            for row in rows
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _told(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def plan(config: ConfigDict, family: str, mesh: Mesh, chips: Sequence[str], utilisation: float) -> list[str]:
    """The report, on 1 to 256 chips of each kind."""
    compiled = compile_all(config, programs.read_model(config, family), mesh)
    meshes = [mesh._replace(data=2**i) for i in range(MOST.bit_length()) if 2**i * mesh.inner <= MOST]
    predictions = {
        name: [predict(compiled, config, other, CHIPS[name], utilisation=utilisation) for other in meshes]
        for name in chips
    }
    lines = report(compiled, predictions, utilisation)
    if config.compute_dtype != "bfloat16":
        lines.append(
            "\nThe peak is bfloat16's, and the config computes in float32: set --config.compute_dtype=bfloat16."
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = describe(__doc__)
    parser.add_argument("--mesh", required=True, help="simulated devices to compile for: data x fsdp x tensor")
    parser.add_argument("--model", default="", help=f"instead of the recipe's: {', '.join(FAMILIES)}")
    parser.add_argument("--chip", default="all", help=f"{', '.join(CHIPS)} or all")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="fraction of the peak FLOP/s that programs reach"
    )
    flags, rest = parser.parse_known_args(argv)
    quieten()
    try:
        mesh = read_mesh(flags.mesh)
        chips = list(CHIPS) if flags.chip == "all" else flags.chip.split(",")
        for name in chips:
            choose(CHIPS, name, "--chip")
        if not 0 < flags.utilisation <= 1:
            raise UserError(f"--utilisation={flags.utilisation}: expected more than 0, at most 1")
        config = parse(rest).config
        given = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={mesh.size}"
        jax.config.update("jax_enable_compilation_cache", False)  # what is in it is not partitioned again
        print("\n".join(plan(config, flags.model, mesh, chips, flags.utilisation)))
    except UserError as error:
        return fail("error", error, EXIT_USER_ERROR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
