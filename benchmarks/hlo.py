"""What one device does in a partitioned program: FLOPs and collectives, read from XLA's text."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
STEP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
AXES = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
OPERANDS = re.compile(r"(?:^|, )(?:\S*[\]}] )?%?([\w.\-]+)(?=,|$)")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 4)


class Step(NamedTuple):
    name: str
    opcode: str
    result: tuple[Array, ...]
    rest: str  # operands and attributes


class Collective(NamedTuple):
    kind: str  # one of KINDS
    result: tuple[Array, ...]  # on a device
    group: tuple[int, ...]  # devices: that of device 0
    count: int  # times in a call of the program


class Work(NamedTuple):
    """Of one device, in one call of the program.

    FLOPs are those of dots and convolutions as tables have them: padding is multiplied, a stride's zeros are not.
    """

    flops: int
    collectives: tuple[Collective, ...]


def partitioned(lowered: jax.stages.Lowered) -> str:
    """The program of one device, as XLA's partitioner leaves it: in the program's own dtypes, whatever the backend.

    Compiles it. Later passes of a backend combine collectives, and may make an all-reduce of which a device reads a
    part a reduce-scatter. A compilation cache must be off: what is taken from it is not partitioned again.
    """
    options = {"xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options=options | {"xla_dump_to": folder, "xla_backend_optimization_level": 0})
        (path,) = Path(folder).glob("*.after_spmd-partitioning*.txt")
        return path.read_text()


def work(text: str) -> Work:
    """The work of a program's text; what a loop does is counted as often as it is done."""
    computations = parse(text)
    flops, collectives = 0, []
    for times, steps in walk(computations, computations["ENTRY"], 1):
        results = {step.name: step.result for step in steps}
        for step in steps:
            kind = step.opcode.removesuffix("-start")
            if step.opcode in ("dot", "convolution"):
                flops += times * product_flops(
                    step, *(results[name][0] for name in OPERANDS.findall(step.rest.split(")")[0]))
                )
            elif kind in KINDS:
                result = step.result[len(step.result) // 2 :] if step.opcode == "all-gather-start" else step.result
                result = result[1:2] if step.opcode == "collective-permute-start" else result
                collectives.append(Collective(kind, result, group(step), times))
    return Work(flops, tuple(collectives))


def parse(text: str) -> dict[str, list[Step]]:
    """The steps of each computation; those of the program's own under ENTRY too."""
    computations: dict[str, list[Step]] = {}
    for line in text.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$", line):
            computations[found[2]] = steps = []
            if found[1]:
                computations["ENTRY"] = steps
        elif found := STEP.match(line):
            name, result, opcode, rest = found.groups()
            steps.append(Step(name, opcode, arrays(result), rest))
    return computations


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays that a type is made of."""
    return tuple(
        Array(dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in SHAPE.findall(text)
    )


def walk(computations: dict[str, list[Step]], steps: list[Step], times: int) -> Iterator[tuple[int, list[Step]]]:
    """Each computation that is run, and how often."""
    yield times, steps
    for step in steps:
        if step.opcode == "while":
            body, condition = (re.search(rf"{role}=%?([\w.\-]+)", step.rest)[1] for role in ("body", "condition"))
            yield from walk(computations, computations[body], times * trip_count(step, computations[condition]))
        elif step.opcode in ("call", "fusion", "conditional"):
            for called in re.findall(r"(?:to_apply|calls|\w+_computations?)=\{?([^,}]+(?:, %[^,}]+)*)", step.rest):
                for name in re.findall(r"[\w.\-]+", called):
                    yield from walk(computations, computations[name], times)


def trip_count(loop: Step, condition: list[Step]) -> int:
    """How often a loop's body is run: what XLA found, or the limit that its counter, from 0, is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    limits = [
        int(step.rest.split(")")[0]) for step in condition if step.opcode == "constant" and not step.result[0].shape
    ]
    if not limits:
        raise ValueError(f"{loop.name}: a loop whose length is not known")
    return max(limits)


def product_flops(step: Step, left: Array, right: Array) -> int:
    """Of a dot, or of a convolution: of each place of the kernel at each place of the result."""
    size = 2 * math.prod(step.result[0].shape)
    if step.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", step.rest)[1]
        return size * math.prod(left.shape[int(dim)] for dim in contracted.split(",") if dim)
    kernel = re.search(r"dim_labels=\w+_(\w+)->", step.rest)[1]
    dilated = re.search(r"lhs_dilate=([\dx]+)", step.rest)
    zeros = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
    return size * math.prod(right.shape) // right.shape[kernel.index("o")] // zeros


def group(step: Step) -> tuple[int, ...]:
    """The devices that take part with device 0, in any of the ways that XLA writes them; of a permutation one pair."""
    text = step.rest
    if step.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", text)[1]
        moved = [
            pair
            for pair in (sorted(map(int, one.split(","))) for one in re.findall(r"[\d,]+\d", pairs))
            if len(set(pair)) > 1
        ]
        return tuple(next((pair for pair in moved if 0 in pair), moved[0] if moved else [0]))
    if found := re.search(r"replica_groups=(\{\{[\d,{} ]*\}\})", text):
        groups = [[int(one) for one in ids.split(",")] for ids in re.findall(r"\{([\d, ]+)\}", found[1])]
    elif found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        groups = numbered(found[3]).reshape(int(found[1]), int(found[2])).tolist()
    else:
        found = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*?)\))? \{(.*?)\}", text)
        groups = mesh_groups(*found.groups()).tolist()
    return tuple(sorted(next(ids for ids in groups if 0 in ids)))


def numbered(text: str) -> np.ndarray:
    """The numbers from 0 on in the order that `[2,4]T(1,0)` says: row by row, of an array with its axes swapped so."""
    shape, *order = (tuple(map(int, one.split(","))) for one in re.findall(r"[\d,]+", text))
    return np.arange(math.prod(shape)).reshape(shape).transpose(*order or [range(len(shape))]).reshape(-1)


def mesh_groups(axes: str, order: str | None, grouped: str) -> np.ndarray:
    """One group a row, of `'a'=4,'b'=2` grouped over `'a'`, or over `'a':(1)2`: the major half of a, beyond 1."""
    over = {name: (int(before or 1), int(size or 0)) for name, before, size in AXES.findall(grouped)}
    shape, taken = [], []
    for name, size in ((name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)):
        before, own = over.get(name, (1, 1))
        own = own or size // before
        taken += [len(shape) + 1] if name in over else []
        shape += [before, own, size // before // own]
    count = math.prod(shape)
    ids = (numbered(order) if order else np.arange(count)).reshape(shape)
    return np.moveaxis(ids, taken, range(-len(taken), 0)).reshape(count // math.prod(shape[i] for i in taken), -1)
