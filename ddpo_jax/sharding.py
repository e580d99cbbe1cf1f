"""Where arrays live: one mesh of devices, and rules from a parameter's path to its place on it.

The mesh has three axes. A batch is cut over `data` and `fsdp`. Parameters and what the optimizer keeps of them are cut
over `fsdp` too, and gathered before a network reads them (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et al. 2023).
Over `tensor` the attention and feed-forward kernels are cut, and stay cut while they are multiplied by (Shoeybi et al.
2019, Sec. 3). No other file names an axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# The dimension that is cut over `tensor`, by the path of a parameter or of an adapter's factor: what comes out of the
# first layer of a pair and goes into the second.
TENSOR = (
    (r"attn[12]/to_[qkv]/kernel(/B)?$", -1),
    (r"attn[12]/to_out_0/kernel(/A)?$", 0),
    (r"ff/net_0/proj/(kernel(/B)?|bias)$", -1),
    (r"ff/net_2/kernel(/A)?$", 0),
)


class Layout(NamedTuple):
    """The places of arrays on one mesh. What it is cut into, a program's result does not depend on."""

    told: str  # for people: the devices and how they are arranged
    num_devices: int
    num_shards: int  # that a batch is cut into
    parameters: Callable  # tree of shapes -> tree of shardings, by the table
    place: Callable  # tree of host or device arrays -> the same on the devices, by the table
    replicate: Callable  # tree of host or device arrays -> the same, whole on every device
    keep: Callable  # inside a program: parameters -> the same, cut as the table says
    gather: Callable  # inside a program: parameters -> the same, as a network reads them: cut over `tensor` only
    rows: Callable  # inside a program: tree of (b, ...) arrays -> the same, cut over the batch
    whole: Callable  # inside a program: tree -> the same, whole on every device
    each_shard: Callable  # inside a program: fn(params, (b, ...) array) -> the same, called for each shard's own rows
    concatenate: Callable  # trees of (b, ...) arrays, cut over the batch -> one; each device joins what it has


def make_layout(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None) -> Layout:
    """A mesh of data x fsdp x tensor devices. At most one of them is -1 and takes what the others leave.

    devices: all by default. Fewer than there are may be used, by a single process alone.

    Raises:
        UserError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
    mesh = Mesh(_arrange(sizes, devices[: math.prod(sizes)]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    batch, everywhere = NamedSharding(mesh, P(_present(mesh, BATCH))), NamedSharding(mesh, P())

    def by_table(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
        def sharding(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return NamedSharding(mesh, spec(name, leaf.shape, {axis: mesh.shape[axis] for axis in axes}))

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def parameters(tree: PyTree) -> PyTree:
        return by_table(tree, ("fsdp", "tensor"))

    def everywhere_of(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: everywhere, tree)

    def constrain(tree: PyTree, shardings: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(tree, shardings)

    def on_shards(fn: Callable, in_specs) -> Callable:
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=batch.spec, check_vma=False)

    @jax.jit
    def concatenate(*trees: PyTree) -> PyTree:
        join = on_shards(lambda *parts: jax.numpy.concatenate(parts), batch.spec)
        return jax.tree.map(join, *trees)

    return Layout(
        told=_tell(mesh),
        num_devices=mesh.size,
        num_shards=mesh.shape["data"] * mesh.shape["fsdp"],
        parameters=parameters,
        place=lambda tree: jax.tree.map(put, tree, parameters(tree)),
        replicate=lambda tree: jax.tree.map(put, tree, everywhere_of(tree)),
        keep=lambda tree: constrain(tree, parameters(tree)),
        gather=lambda tree: constrain(tree, by_table(tree, ("tensor",))),
        rows=lambda tree: constrain(tree, jax.tree.map(lambda _: batch, tree)),
        whole=lambda tree: constrain(tree, everywhere_of(tree)),
        each_shard=lambda fn: on_shards(fn, (P(), batch.spec)),
        concatenate=concatenate,
    )


def spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Which dimensions of a parameter are cut over which of the mesh's axes, of these sizes.

    A dimension is only cut into equal parts. `fsdp` takes the largest one that `tensor` leaves.
    """
    axes: list[str | None] = [None] * len(shape)
    named = [dim % len(shape) for pattern, dim in TENSOR if re.search(pattern, path)] if shape else []
    for axis, candidates in (("tensor", named), ("fsdp", range(len(shape)))):
        size = sizes.get(axis, 1)
        fitting = [i for i in candidates if size > 1 and axes[i] is None and shape[i] % size == 0]
        if fitting:
            axes[max(fitting, key=lambda i: shape[i])] = axis
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def first_device(tree: PyTree) -> PyTree:
    """A sharding for each leaf: whole, on this process's first device. For work that is no run's."""
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), tree)


def one_device() -> Layout:
    """The layout of `first_device`."""
    return make_layout(devices=jax.local_devices()[:1])


def put(array, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array placed so. Of an array of the host each process sends only what its own devices hold."""
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(array: jax.Array | np.ndarray) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
    """The rows of a (b, ...) array that are this process's to work on, and their numbers: each row is one process's."""
    if not isinstance(array, jax.Array):
        return np.arange(len(array)), np.asarray(array)
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if not own:
        return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
    own.sort(key=lambda shard: shard.index[0].start or 0)
    numbers = [np.arange(len(array))[shard.index[0]] for shard in own]
    return np.concatenate(numbers), np.concatenate([np.asarray(shard.data) for shard in own])


def bytes_held(tree: PyTree) -> int:
    """Bytes of the tree's arrays on the device of this process that holds most of them."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards if isinstance(leaf, jax.Array) else ():
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)


def _sizes(wanted: dict[str, int], count: int) -> tuple[int, ...]:
    told = ", ".join(f"mesh.{name}={size}" for name, size in wanted.items())
    fills = [name for name, size in wanted.items() if size == -1]
    if len(fills) > 1 or any(size < 1 and size != -1 for size in wanted.values()):
        raise UserError(f"{told}: expected numbers of 1 or more, and -1 at most once, for what the others leave")
    product = math.prod(size for size in wanted.values() if size != -1)
    if fills and count % product == 0:
        return tuple(count // product if size == -1 else size for size in wanted.values())
    if fills or product > count or (product < count and jax.process_count() > 1):
        raise UserError(f"{told}: cannot be filled by {count} devices; choose sizes whose product is {count}")
    return tuple(wanted.values())


def _arrange(sizes: tuple[int, ...], devices: Sequence) -> np.ndarray:
    """The devices as an array of these sizes, neighbours on the last axes; slices are joined along `data`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices)
    if sizes[0] % slices and devices[0].platform != "tpu":  # GPUs of one host may count as a slice
        order = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return np.array(order, object).reshape(sizes)
    if sizes[0] % slices:
        raise UserError(f"mesh.data={sizes[0]}: expected a multiple of the {slices} slices, which it joins")
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)


def _tell(mesh: Mesh) -> str:
    kind, count = mesh.devices.flat[0].device_kind, len(jax.devices())
    devices = f"{mesh.size} {kind} devices" if mesh.size > 1 else f"1 {kind} device"
    unused = f" of {count}; mesh.data=-1 would use them all" if mesh.size < count else ""
    return f"mesh {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}, {devices}{unused}"


def _present(mesh: Mesh, axes: Sequence[str]) -> tuple[str, ...] | None:
    """Those of the axes that cut anything."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1) or None
