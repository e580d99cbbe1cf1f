"""Checkpoints: whole pytrees, saved in the background and atomically by orbax, at the end of rounds."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree


@contextmanager
def open_manager(folder: Path, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """A manager of the checkpoints in `folder` that keeps the newest `keep`. Leaving it waits for the last save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
        yield manager
        manager.wait_until_finished()


def save(manager: ocp.CheckpointManager, step: int, tree: PyTree) -> None:
    """Starts to write `tree` as checkpoint `step`, unless it is there; its arrays may be donated once this returns."""
    with signals_held():
        if manager.latest_step() != step:
            manager.save(step, args=ocp.args.StandardSave(tree))


def restore_latest(manager: ocp.CheckpointManager, like: PyTree) -> PyTree | None:
    """The newest checkpoint, with the structure, dtypes and shardings of `like`; None if there is none.

    Raises:
        UserError: it is of a model of other shapes.
    """
    step = manager.latest_step()
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
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(
                f"{folder / str(step)}: not a whole checkpoint of a run ({reason}); give another"
            ) from error


def _ignore_reads_under_way() -> None:
    """Keeps silent what follows a read that failed: others end later, and find orbax's event loop closed."""
    tell = sys.unraisablehook

    def tell_others(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


def host_copy(tree: PyTree) -> PyTree:
    """The tree as numpy arrays that nothing else can change or donate."""
    return jax.tree.map(np.array, tree)


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds SIGTERM and SIGINT back until the block is left.

    An exception raised by a handler in the middle of orbax's save would leave threads that wait for it for ever, and
    Python waits for them when it exits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
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
