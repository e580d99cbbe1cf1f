"""Measures one cell of benchmarks.gpu_suite, in a process of its own: the programs of a run, on random weights.

python -m benchmarks.gpu_cell '{"cell": [...], "sizes": "full", "path": "FILE", "cache": "FOLDER"}'

A process a cell, so that the allocator's peak is the cell's own, that one which dies takes no other with it, and that
one which takes too long can be ended. What is measured is in the file as soon as it is.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from benchmarks import operations, programs
from benchmarks.families import SCHEDULER
from benchmarks.gpu_cells import SIZES, Cell, Size
from configs import base
from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.models.pipeline import parse_configs
from ddpo_jax.sharding import make_layout
from ddpo_jax.types import PyTree
from ddpo_jax.update import MicroBatch
from ddpo_jax.workdir import write_atomically

ALGORITHMS = {"ddpo": "ddpo_is", "dpo": "diffusion_dpo"}
TIMED = 3.0  # seconds that a program is called again and again for, and
FEWEST, MOST = 5, 30  # calls
TRACED = 2  # calls


class Arrays(NamedTuple):
    """On the device."""

    state: PyTree
    frozen: PyTree
    batch: PyTree
    tokens: PyTree
    keys: PyTree
    total: PyTree


def config_of(cell: Cell, size: Size) -> ConfigDict:
    """The run that a cell is of. One optimizer step a round, before which no log-prob is computed a second time."""
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "algorithm": ALGORITHMS[cell.method],
            "attention": cell.attention,
            "compute_dtype": "bfloat16",
            "data.batch_size": size.pairs,
            "sample.num_steps": size.num_steps,
            "sample.num_prompts": size.samples,
            "sample.decode_chunk_size": size.decode_chunk_size,
            "train.num_updates": 1,
            "train.lora_rank": {"full": 0, "lora": 4}[cell.trains],
            "train.remat": cell.remat,
        }
    )
    return config


def model_of(size: Size) -> tuple:
    """As programs.read_model gives it."""
    family = size.family
    configs = parse_configs({"_class_name": family.pipeline}, family.parts)
    return configs, process.noise_schedule(SCHEDULER | {"prediction_type": family.prediction_type})


def fill(run: programs.AbstractRun, timesteps: np.ndarray) -> Arrays:
    """A run's inputs, random, and made on the device. Moments and sums of gradients are 0."""
    params, frozen, tokens, keys = run.sample.inputs
    batch = born(run.batch, "batch")
    if "trajectory" in batch._fields:
        t = jnp.broadcast_to(jnp.asarray(timesteps), batch.trajectory.t.shape)
        batch = batch._replace(trajectory=batch.trajectory._replace(t=t))
    else:
        batch = batch._replace(preference=np.ones(batch.preference.shape, np.float32))
    return Arrays(
        state=zeros(run.state._replace(params=None))._replace(params=born(params, "params")),
        frozen=born(frozen, "frozen"),
        batch=batch,
        tokens=zeros(tokens),
        keys=jax.random.split(jax.random.key(0), len(keys)),
        total=zeros(run.accumulate.inputs[-1]),
    )


def born(shapes: PyTree, name: str) -> PyTree:
    """Normal kernels of standard deviation 1/√fan-in, scales of norms 1, shifts 0; so activations stay finite."""

    def one(path, leaf) -> jax.Array:
        path = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
        last = path.rpartition("/")[2]
        key = jax.random.key(zlib.crc32(path.encode()))
        if leaf.dtype == bool or last in ("scale", "weight"):
            return filled(leaf.shape, leaf.dtype, 1)
        if last == "bias":
            return filled(leaf.shape, leaf.dtype, 0)
        fan_in = math.prod(leaf.shape[:-1]) if last in ("kernel", "embedding", "A", "B") else 1
        return normal(leaf.shape, leaf.dtype, key, fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(one, shapes)


def zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: filled(leaf.shape, leaf.dtype, 0), shapes)


@partial(jax.jit, static_argnums=(0, 1))
def normal(shape: tuple[int, ...], dtype: Any, key: jax.Array, scale: jax.Array) -> jax.Array:
    return (jax.random.normal(key, shape) * scale).astype(dtype)


@partial(jax.jit, static_argnums=(0, 1))
def filled(shape: tuple[int, ...], dtype: Any, value: jax.Array) -> jax.Array:
    return jnp.full(shape, value, dtype)


def compile_twice(program: programs.Program, inputs: Sequence) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The compiled program, and seconds from its Python to it: cold, and again from the persistent cache alone.

    "traced" are those of the first that Python took, before XLA began.
    """
    with tempfile.TemporaryDirectory() as folder:
        use_cache(folder)
        compiled, traced, cold = compile_once(program, inputs)
        jax.clear_caches()
        _, _, cached = compile_once(program, inputs)
    return compiled, {"traced": traced, "cold": cold, "cached": cached}


def compile_once(program: programs.Program, inputs: Sequence) -> tuple[jax.stages.Compiled, float, float]:
    """The compiled program, seconds until it was traced, and until it was compiled."""
    begin = time.perf_counter()
    lowered = program.fn.lower(*inputs)
    traced = time.perf_counter() - begin
    return lowered.compile(), traced, time.perf_counter() - begin


def use_cache(folder: str) -> None:
    """Compiled programs are kept there from now on, and read from nowhere else."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def in_a_row(call: Callable[[], PyTree], count: int) -> list[float]:
    """Seconds from each call's end to the next one's, as a run makes them: one is always under way."""
    ends, before = [time.perf_counter()], None
    for _ in range(count):
        result = call()
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = result
    jax.block_until_ready(before)
    ends.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(ends)]


def measure_program(call: Callable[[], PyTree], compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Seconds of a call, the device's idle share, and where its time goes, after two calls to warm up."""
    first, second = in_a_row(call, 1) + in_a_row(call, 1)
    seconds = in_a_row(call, min(max(math.ceil(TIMED / second), FEWEST), MOST))
    median = statistics.median(seconds)
    found = operations.traced(lambda: in_a_row(call, TRACED), [compiled.as_text()])
    return {
        "first": first,
        "seconds": median,
        "calls": len(seconds),
        "idle": None if found.busy is None else max(0.0, 1 - found.busy / (TRACED * median)),
        "operations": found.seconds,
    }


def temporary(compiled: jax.stages.Compiled) -> int:
    """Bytes that a call needs beside its inputs, as XLA has planned it."""
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def calls(cell: Cell, arrays: Arrays, num_slices: int) -> dict[str, tuple[tuple, Callable]]:
    """Of each program of a cell, its inputs and how it is called with what is donated threaded through."""
    held = {"state": arrays.state, "total": arrays.total}
    rng = np.random.default_rng(0)
    count = jax.tree.leaves(arrays.batch.cond)[0].shape[0]
    rows = np.stack([rng.integers(limit, size=cell.micro_batch_size) for limit in (count, num_slices)], axis=1)
    micro_batch = MicroBatch(rows.astype(np.int32), np.ones(len(rows), np.float32))
    key = jax.random.key(1)

    def learning() -> tuple:
        return held["state"].params, arrays.frozen, arrays.batch, micro_batch, key, held["total"]

    def drawing() -> tuple:
        return held["state"].params, arrays.frozen, arrays.tokens, arrays.keys

    def sample(compiled) -> PyTree:
        return compiled(*drawing())

    def accumulate(compiled) -> PyTree:
        held["total"], metrics = compiled(*learning())
        return metrics

    def apply(compiled) -> PyTree:
        held["state"], scalars = compiled(held["state"], held["total"])
        return scalars

    learn = {"accumulate": (learning, accumulate), "apply": (lambda: (held["state"], held["total"]), apply)}
    return ({"sample": (drawing, sample)} if cell.chunk_size else {}) | (learn if cell.micro_batch_size else {})


def check_device(device: jax.Device, sizes: str, expected: str | None) -> None:
    """Raises UserError where a cell is not to be measured on this one."""
    if sizes == "full" and device.platform == "cpu":
        raise UserError("there is no GPU here; --sizes=tiny shows that the suite works")
    if expected not in (None, device.device_kind):
        raise UserError(f"this is a {device.device_kind}, and the folder's figures are of {expected}: give another")


def measure(cell: Cell, size: Size, keep: Callable[[dict], None]) -> dict[str, Any]:
    """All figures of a cell; `keep` is called with those that there are, again and again.

    A program that the device has no memory for is told of, and those after it are left out.
    """
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "programs": {}}
    config, (configs, schedule) = config_of(cell, size), model_of(size)
    run = programs.abstract_run(
        config,
        configs,
        schedule,
        layout=make_layout(devices=[device]),
        chunk_size=max(1, cell.chunk_size),
        micro_batch_size=max(1, cell.micro_batch_size),
    )
    stage = "the run's arrays"
    try:
        arrays = fill(run, np.asarray(process.ddim(schedule).timesteps(config.sample.num_steps), np.float32))
        jax.block_until_ready(arrays)
        num_slices = size.num_steps if cell.method == "ddpo" else 1
        found["held"] = programs.size(arrays)
        for stage, (inputs, call) in calls(cell, arrays, num_slices).items():
            compiled, seconds = compile_twice(getattr(run, stage), inputs())
            found["programs"][stage] = {"compile": seconds, "temporary": temporary(compiled)}
            keep(found)
            found["programs"][stage] |= measure_program(partial(call, compiled), compiled)
            found["peak"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
            keep(found)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"status": "out of memory", "why": stage}
    return found | {"status": "measured"}


def main(argv: Sequence[str]) -> None:
    job = json.loads(argv[0])
    path = Path(job["path"])

    def keep(found: dict) -> None:
        write_atomically(path, json.dumps(found))

    cell = Cell(*job["cell"])
    use_cache(job["cache"])
    begin = time.perf_counter()
    try:
        check_device(jax.devices()[0], job["sizes"], job["device"])
        found = measure(cell, SIZES[job["sizes"]][cell.model], keep)
    except UserError as error:  # such as a kernel that is not to be had here
        found = {"status": "skipped", "why": str(error)}
    keep(found | {"seconds": time.perf_counter() - begin})


if __name__ == "__main__":
    main(sys.argv[1:])
