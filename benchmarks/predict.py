"""What a round would take on so many chips, from what one device does and holds on a mesh that was compiled for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from benchmarks.chips import MEMORY
from benchmarks.hlo import Array, Collective, Work
from ddpo_jax import settings
from ddpo_jax.methods import method_of

GIB = 2**30
USABLE = 0.92  # of a chip's memory: the rest is the runtime's own, and fragmentation


class Chip(NamedTuple):
    flops: float  # a second, bfloat16, without sparsity
    memory: float  # bytes
    memory_bandwidth: float  # bytes a second
    link: float  # bytes a second that a device sends around a ring
    node: int  # devices that such links join
    network: float  # bytes a second and device beyond them


# H100 and H200 SXM: NVIDIA's data sheets (the FLOP/s given there are with sparsity, twice these); NVLink, 900 GB/s in
# both directions together, joins the eight GPUs of a machine, and each has an InfiniBand port of 400 Gb/s (DGX H100).
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, 2026. `link` is one link, one way: half a chip's bandwidth over
# its four links (v5e, v6e) or six (v5p); v4's is in Jouppi et al. 2023, Table 4. So much goes along one axis of a slice
# that is no whole pod, where rings do not close; a group that spans several axes can be faster. `node` is a pod,
# `network` the data center's, a chip: as given (v5p), or a pod's over its chips (v5e, v6e); v4's is taken as v5p's.
CHIPS = {
    "h100": Chip(989e12, MEMORY, 3.35e12, 450e9, 8, 50e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 50e9, 4096, 6.25e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 50e9, 256, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 100e9, 8960, 6.25e9),
    "v6e": Chip(918e12, 32e9, 1.64e12, 100e9, 256, 12.5e9),
}


class Mesh(NamedTuple):
    data: int
    fsdp: int
    tensor: int

    @property
    def num_shards(self) -> int:
        """That a batch is cut into."""
        return self.data * self.fsdp

    @property
    def inner(self) -> int:
        """Devices of one step along `data`; they are neighbours."""
        return self.fsdp * self.tensor

    @property
    def size(self) -> int:
        return self.data * self.inner


class Round(NamedTuple):
    """What a round is cut into on a mesh, by program."""

    rows: dict[str, int]  # a shard and call: pictures of `sample`, (sample, timestep) rows of `accumulate`
    calls: dict[str, int]  # a step: the sampling of the round, or an optimizer step
    num_steps: int  # optimizer steps
    recomputed: int  # calls of `accumulate` for old log-probs
    num_samples: int  # without what fills up


class Compiled(NamedTuple):
    """What a device does and holds on the mesh that was compiled for, by program."""

    mesh: Mesh
    round: Round
    work: dict[str, Work]
    traffic: dict[str, int]  # bytes of its inputs and outputs
    held: dict[str, int]  # bytes, whatever `data` is
    sample: int  # bytes of one sample's trajectory and condition
    activations: Callable  # program, rows -> bytes
    recomputes: bool


class Prediction(NamedTuple):
    """On so many chips."""

    devices: int
    num_bytes: int  # a device
    fits: bool
    sampling: float  # seconds
    step: float  # of the optimizer
    round: float
    collectives: float  # of the round
    samples_per_second: float


def cut(config: ConfigDict, mesh: Mesh, *, recomputes: bool) -> Round:
    """A round as ddpo_jax.settings cuts it on this mesh. Every step of a sample is taken to be learned from."""
    schedule = settings.schedule(config, num_shards=mesh.num_shards)
    chunk_size = settings.chunk_size(config, num_shards=mesh.num_shards)
    samples = method_of(config).drawn(config)
    taken = max(1, round(method_of(config).slices(config) * schedule.timestep_fraction))
    micro_batches = -(-(-(-samples // schedule.num_updates) * taken) // schedule.micro_batch_size)
    return Round(
        rows={"sample": chunk_size, "accumulate": schedule.micro_batch_size // mesh.num_shards, "apply": 1},
        calls={
            "sample": -(-samples // (chunk_size * mesh.num_shards)),
            "accumulate": micro_batches,
            "apply": 1,
        },
        num_steps=schedule.num_updates * schedule.num_inner_epochs,
        recomputed=micro_batches * schedule.num_updates if recomputes else 0,
        num_samples=samples,
    )


def at(compiled: Compiled, name: str, one: Collective, mesh: Mesh, rows: int) -> tuple[float, tuple[int, ...]]:
    """Bytes of a collective's result, and the devices of its group, on a mesh with other `data`."""
    old, inner = compiled.mesh, compiled.mesh.inner
    more = rows / compiled.round.rows[name]
    spans = any(device >= inner for device in one.group)
    all_rows = compiled.round.rows[name] * old.num_shards

    def scaled(array: Array) -> float:
        leading = array.shape[:1]
        if spans and leading in ((all_rows,), (2 * all_rows,)):  # guidance doubles them
            return array.num_bytes * more * mesh.num_shards / old.num_shards
        own = one.kind in ("all-to-all", "collective-permute") or max(one.group) < old.tensor
        return array.num_bytes * (more if own else 1)

    num_bytes = sum(map(scaled, one.result))
    if not spans:
        return num_bytes, one.group
    if one.kind == "collective-permute":
        return num_bytes, (0, mesh.size - 1) if mesh.data > 1 else (0,)
    along = max(1, len({device // inner for device in one.group}) * mesh.data // old.data)
    stride = mesh.data // along * inner
    return num_bytes, tuple(i * stride + j for i in range(along) for j in sorted({d % inner for d in one.group}))


def ring_seconds(kind: str, num_bytes: float, group: Sequence[int], chip: Chip) -> float:
    """Of a collective whose result has so many bytes on a device; device 0's machine or slice comes first."""
    count, near = len(group), sum(device < chip.node for device in group)
    match kind:
        case "collective-permute":
            return 0.0 if count == 1 else num_bytes / (chip.link if near == count else chip.network)
        case "all-to-all":
            return num_bytes / count * ((near - 1) / chip.link + (count - near) / chip.network)
    times = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": count}[kind]
    machines = -(-count // near)
    inside, across = (near - 1) / near / chip.link, (machines - 1) / machines / near / chip.network
    return times * num_bytes * (inside + across)


def predict(compiled: Compiled, config: ConfigDict, mesh: Mesh, chip: Chip, *, utilisation: float) -> Prediction:
    """A round on a mesh that differs from the compiled one in `data` alone."""
    one = cut(config, mesh, recomputes=compiled.recomputes)
    computing, sending = {}, {}  # seconds a call
    for name, work in compiled.work.items():
        rows = one.rows[name]
        flops = work.flops * rows / compiled.round.rows[name]
        reading = compiled.traffic[name] / chip.memory_bandwidth
        computing[name] = max(flops / (chip.flops * utilisation), reading)
        sending[name] = sum(
            collective.count * ring_seconds(collective.kind, *at(compiled, name, collective, mesh, rows), chip)
            for collective in work.collectives
        )
    calls = {name: count * (1 if name == "sample" else one.num_steps) for name, count in one.calls.items()}
    calls["accumulate"] += one.recomputed
    spent = {name: computing[name] + sending[name] for name in calls}
    seconds = sum(calls[name] * spent[name] for name in calls)
    num_bytes = sum(memory(compiled, one, mesh).values())
    return Prediction(
        devices=mesh.size,
        num_bytes=num_bytes,
        fits=num_bytes <= USABLE * chip.memory,
        sampling=one.calls["sample"] * spent["sample"],
        step=one.calls["accumulate"] * spent["accumulate"] + spent["apply"],
        round=seconds,
        collectives=sum(calls[name] * sending[name] for name in calls),
        samples_per_second=one.num_samples / seconds,
    )


def memory(compiled: Compiled, one: Round, mesh: Mesh) -> dict[str, int]:
    """Bytes a device at the peak: that of sampling or of an update, whichever is more."""
    held = compiled.held
    update = held["gradients"] + compiled.activations("accumulate", one.rows["accumulate"])
    peak = {"activations of sampling": compiled.activations("sample", one.rows["sample"])}
    if update > peak["activations of sampling"]:
        peak = {"gradients": held["gradients"], "activations of the update": update - held["gradients"]}
    samples = one.calls["sample"] * one.rows["sample"]
    return (
        {name: held[name] for name in held if name != "gradients"} | {"trajectories": samples * compiled.sample} | peak
    )
