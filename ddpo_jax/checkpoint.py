"""Checkpoints: whole pytrees, saved in the background and atomically by orbax, at the end of rounds."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ddpo_jax import multihost
from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree

SCORE = "reward"  # the metric by which a checkpoint is the best
JSON_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metrics")
PORTION = 2**30  # bytes that are read at a time to see whether a checkpoint is whole


class Pieces(NamedTuple):
    """What this process holds of an array that is cut over several, on the host."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding
    pieces: Mapping[tuple, np.ndarray]  # by where they begin and end


@contextmanager
def open_manager(
    folder: Path, *, keep: int, keep_best: int = 0, note: Callable[[str], None] = print
) -> Iterator[ocp.CheckpointManager]:
    """A manager of the checkpoints in `folder` that keeps the newest and the best. Leaving it waits for the last save.

    keep, keep_best: how many of each.  note: is told of the newest if it is not whole; it is then renamed to
    `broken-STEP`, and the one before it is the newest.
    """
    multihost.on_main(lambda: _set_broken_aside(folder, note))

    def score(metrics: Mapping[str, float]) -> float:
        return metrics[SCORE]

    best = BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
        best_fn=score,  # without one orbax does not write the metrics
        cleanup_tmp_directories=True,
    )
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
        # It would ask JAX's coordination service at each save, by the number of the round, whether to stop; the run
        # asks at each program, by the number of the program; and the service takes both for one count.
        manager.reached_preemption = lambda step: False
        yield manager
        manager.wait_until_finished()


def save(manager: ocp.CheckpointManager, step: int, tree: PyTree, *, score: float | None = None) -> None:
    """Starts to write `tree` as checkpoint `step`, unless it is there; its arrays may be donated once this returns.

    tree: of arrays, or a `host_copy`.  score: the more, the better; None if nothing is known.
    """
    with signals_held():
        if manager.latest_step() != step:
            known = score is not None and np.isfinite(score)
            manager.save(
                step, args=ocp.args.StandardSave(_joined(tree)), metrics={SCORE: float(score)} if known else None
            )


def restore_latest(manager: ocp.CheckpointManager, like: PyTree) -> PyTree | None:
    """The newest checkpoint, with the structure, dtypes and shardings of `like`; None if there is none.

    Raises:
        UserError: it is of a model of other shapes, or not all processes see it.
    """
    step = multihost.on_main(manager.latest_step)
    multihost.together(lambda: _see(manager, step))
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    # Sorted: what was kept comes back as dicts, in the order of their names.
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(manager.item_metadata(step).tree))
    if kept != sorted(leaf.shape for leaf in jax.tree.leaves(abstract)):
        raise UserError(
            f"{manager.directory}: checkpoint {step} is of another model than this one; give another --workdir"
        )
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def _see(manager: ocp.CheckpointManager, step: int | None) -> None:
    """Waits until a shared disk shows this process the same newest step as the first one, which alone renames."""
    for _ in range(60):
        if manager.latest_step() == step:
            return
        time.sleep(1)
        manager.reload()
    raise UserError(
        f"{manager.directory}: the first process sees the checkpoint {step}, another {manager.latest_step()};"
        " give a --workdir on a disk that all share"
    )


def _set_broken_aside(folder: Path, note: Callable[[str], None]) -> None:
    """Renames the newest checkpoints until one can be read, every byte of it. Kills leave none such; disks do.

    Raises:
        UserError: none is whole, or the disk cannot be read now; nothing was renamed.
    """
    steps, broken = sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True), {}
    for step in steps:
        try:
            _read_through(folder / str(step))
            break
        except Exception as error:  # orbax and tensorstore raise many unrelated types for files that are not whole
            _ignore_reads_under_way()
            lacking = isinstance(error, FileNotFoundError | NotADirectoryError)
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and not lacking):
                raise UserError(f"{folder / str(step)}: could not be read ({_reason(error)}); try again") from error
            broken[step] = _reason(error)
    if steps and len(broken) == len(steps):
        reasons = "; ".join(f"{step}: {reason}" for step, reason in broken.items())
        raise UserError(f"{folder}: no checkpoint is whole ({reasons}); restore one, or give another --workdir")
    for step, reason in broken.items():
        aside = folder / f"broken-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        note(f"checkpoint {step} is not whole ({reason}): kept as {aside}, and the one before it is taken")


def _read_through(path: Path) -> None:
    """Reads all of a checkpoint, a portion at a time. For one process alone."""
    for file in path.rglob("*"):
        if file.is_file() and (file.name in JSON_FILES or file.parent.name == "array_metadatas"):
            json.loads(file.read_text(encoding="utf-8"))
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="read"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        tree = checkpointer.metadata(path / "default").item_metadata.tree
        leaves, structure = jax.tree.flatten(tree)
        sizes = np.cumsum([np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves])
        for portion in np.unique(sizes // PORTION):
            pairs = zip(leaves, sizes, strict=True)
            wanted = [leaf if size // PORTION == portion else ocp.PLACEHOLDER for leaf, size in pairs]
            item = jax.tree.unflatten(structure, wanted)
            restore_args = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), item)
            checkpointer.restore(path / "default", args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))


def read_trainable(folder: Path, step: int | None) -> tuple[int, PyTree]:
    """A checkpoint's step and what it trained, as numpy arrays: the running average if the run kept one.

    folder: a run's `checkpoints`.  step: None is the newest. Neither optimizer nor config is needed, or read.

    Raises:
        UserError: there is no such checkpoint, or it is not whole.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the checkpoints of a run")
    with ocp.CheckpointManager(folder.absolute(), item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        steps = manager.all_steps()
        if not steps or step not in (None, *steps):
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"{folder}: no checkpoint {'' if step is None else step}; there are: {known}")
        step = max(steps) if step is None else step
        try:
            saved = manager.item_metadata(step).tree
            name = "params" if saved["ema"] is None else "ema"
            like = {name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved[name])}
            restore_args = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), like)
            args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
            return step, manager.restore(step, args=args)[name]
        except Exception as error:  # orbax and tensorstore raise many unrelated types for files that are not whole
            _ignore_reads_under_way()
            raise UserError(
                f"{folder / str(step)}: not a whole checkpoint of a run ({_reason(error)}); give another"
            ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _ignore_reads_under_way() -> None:
    """Keeps silent what follows a read that failed: others end later, and find orbax's event loop closed."""
    tell = sys.unraisablehook

    def tell_others(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


def host_copy(tree: PyTree) -> PyTree:
    """The tree on the host, where nothing else can change or donate it: numpy arrays, and `Pieces` of those that other
    processes hold parts of."""

    def copy(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.array(leaf)
        pieces = {_where(shard.index, leaf.shape): np.array(shard.data) for shard in leaf.addressable_shards}
        return Pieces(leaf.shape, leaf.dtype, leaf.sharding, pieces)

    return jax.tree.map(copy, tree)


def _joined(tree: PyTree) -> PyTree:
    """A `host_copy` as orbax takes it: each process's pieces are put back on its devices, as parts of one array."""

    def join(leaf):
        if not isinstance(leaf, Pieces):
            return leaf
        shape, _, sharding, pieces = leaf
        return jax.make_array_from_callback(shape, sharding, lambda index: pieces[_where(index, shape)])

    return jax.tree.map(join, tree, is_leaf=lambda leaf: isinstance(leaf, Pieces))


def _where(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds SIGTERM and SIGINT back until the block is left.

    An exception raised by a handler in the middle of orbax's save would leave threads that wait for it for ever, and
    Python waits for them when it exits.
    """
    if threading.current_thread() is not threading.main_thread() or jax.distributed.is_initialized():
        yield  # handlers run in the main thread alone; that of JAX's coordination service raises nothing
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)
