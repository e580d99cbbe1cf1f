"""Checkpoints: whole pytrees, saved in the background and atomically by orbax, at the end of rounds."""

from __future__ import annotations

import signal
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
