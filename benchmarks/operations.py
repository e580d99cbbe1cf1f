"""Where a device's time goes, by kind of operation: a trace of JAX's profiler, read with the programs' own text."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import hlo

KINDS = ("convolution", "matmul", "attention", "elementwise", "copies")
# Operations that only hold others.
HOLDING = ("while", "call", "conditional")
MOVING = {
    *("copy", "copy-start", "copy-done", "transpose", "bitcast", "reshape", "concatenate", "slice", "pad", "reverse"),
    *("dynamic-slice", "dynamic-update-slice", "broadcast", "convert", "gather"),
    *("parameter", "constant", "tuple", "get-tuple-element", "iota"),
}
# What jax.nn.dot_product_attention does within a layer of that name; the linear layers around it are no part of it.
ATTENTION = re.compile(r'op_name="[^"]*(?:attn\w*|attentions_\d+)/vmap\(')
# Of kernels that no operation of a program is known for.
KERNELS = {
    "attention": re.compile(r"fmha|flash|sdpa", re.I),
    "convolution": re.compile(r"conv(?!ert)|fprop|dgrad|wgrad", re.I),
    "matmul": re.compile(r"gemm|matmul|nvjet|cutlass|dot", re.I),
    "copies": re.compile(r"memcpy|memset|copy|transpose|concatenate|slice|nchw|nhwc", re.I),
}


class Event(NamedTuple):
    """One operation, once."""

    name: str
    start: float  # nanoseconds
    duration: float


class Traced(NamedTuple):
    """A stretch of work."""

    busy: float | None  # seconds in which an operation was on the device; None: nothing was traced
    seconds: dict[str, float]  # of the device, by kind


def traced(work: Callable[[], None], programs: Sequence[str]) -> Traced:
    """What the device did meanwhile. work: ends when the device has done it. programs: compiled text of what it calls.

    Meanwhile XLA runs CUDA graphs operation by operation, and the host is slowed: the wall clock says nothing.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            work()
        finally:
            jax.profiler.stop_trace()
        found = list(Path(folder).rglob("*.xplane.pb"))
        events = [event for path in found for event in read(jax.profiler.ProfileData.from_file(str(path)))]
    return summarize(events, [kinds_of(text) for text in programs])


def read(data: jax.profiler.ProfileData) -> Iterator[Event]:
    """What ran on GPUs' streams, or where there is none, the operations of programs that ran on the host's threads."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if devices or operation:
                    yield Event(operation or event.name, event.start_ns, event.duration_ns)


def summarize(events: Sequence[Event], programs: Sequence[Mapping[str, str]]) -> Traced:
    """Seconds in all and by kind. programs: operation -> kind, of each program."""
    known = {plain(name): kind for kinds in programs for name, kind in kinds.items()}
    events = [event for event in events if not re.fullmatch(rf"({'|'.join(HOLDING)})[.\d]*", event.name)]
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in events:
        seconds[known.get(plain(event.name)) or kernel_kind(event.name)] += event.duration / 1e9
    return Traced(busy(events) if events else None, seconds)


def busy(events: Sequence[Event]) -> float:
    """Seconds in which at least one was under way."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        end = event.start + event.duration
        total += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return total / 1e9


def kinds_of(text: str) -> dict[str, str]:
    """Of each operation of a compiled program, its kind, one of KINDS."""
    computations = hlo.parse(text)
    return {step.name: kind(step, computations) for steps in computations.values() for step in steps}


def kind(step: hlo.Step, computations: Mapping[str, list[hlo.Step]]) -> str:
    """A fusion is what costs most in it."""
    inside = list(within(step, computations))
    opcodes = {one.opcode for one in inside}
    targets = " ".join(re.findall(r'custom_call_target="([^"]+)"', " ".join(one.rest for one in inside)))
    if ATTENTION.search(step.rest) or KERNELS["attention"].search(targets):
        return "attention"
    if "convolution" in opcodes or KERNELS["convolution"].search(targets):
        return "convolution"
    if "dot" in opcodes or KERNELS["matmul"].search(targets):
        return "matmul"
    return "copies" if opcodes <= MOVING | {"fusion"} else "elementwise"


def within(step: hlo.Step, computations: Mapping[str, list[hlo.Step]]) -> Iterator[hlo.Step]:
    """The operation, and those of a fusion's computation."""
    yield step
    for name in re.findall(r"calls=%?([\w.\-]+)", step.rest) if step.opcode == "fusion" else ():
        for inner in computations.get(name, ()):
            yield from within(inner, computations)


def plain(name: str) -> str:
    """An operation's name as the kernel that was made of it has it."""
    return re.sub(r"\W", "_", name)


def kernel_kind(name: str) -> str:
    return next((kind for kind, pattern in KERNELS.items() if pattern.search(name)), "elementwise")
