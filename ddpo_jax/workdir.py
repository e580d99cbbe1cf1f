"""A run's folder: one run at a time, one config for ever."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ddpo_jax.errors import UserError

# What may change when a run is continued: how long it goes on, what it tells, and how it waits. Nothing it computes,
# but for how that is rounded.
MAY_DIFFER = (
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "sample.chunk_size", "sample.decode_chunk_size"),
    "train.micro_batch_size",
    "train.remat",
    "attention",
    "convolution",
    "num_epochs",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best_checkpoints",
    "eval_every",
    "compilation_cache",
    "tensorboard",
    "wandb_project",
    "reward.deadline",
    "reward.num_workers",
    "reward.max_missing",
    "data.cache",
)


@contextmanager
def claim(workdir: Path, config: Mapping[str, Any], *, patience: int | float = 0) -> Iterator[Callable[[], None]]:
    """Holds the folder for this run; gives a function that keeps the config in config.json.

    patience: seconds to wait for another run to leave it.

    Until that is called nothing stays behind: a folder made here is removed again.

    Raises:
        UserError: the folder cannot be written, another run is in it, or it holds rounds of another config.
    """
    flat = flatten(config)
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); give a folder of yours") from None
    with lock:
        begin = time.monotonic()
        while not _locked(lock):
            if time.monotonic() - begin >= patience:
                raise UserError(f"--workdir={workdir}: another run is in it; wait for it or give another folder")
            time.sleep(1)
        try:
            _check_config(workdir, flat)
            yield lambda: write_atomically(workdir / "config.json", json.dumps(flat, indent=2) + "\n")
        finally:
            if {path.name for path in workdir.iterdir()} == {".lock"}:
                (workdir / ".lock").unlink()
                _remove_empty(made)


@contextmanager
def hold(path: Path, name: str) -> Iterator[None]:
    """Holds a lock file, which stays behind, against other processes.

    Raises:
        UserError: another process holds it.
    """
    with path.open("w") as lock:
        if not _locked(lock):
            raise UserError(f"{name}: another process is in it; wait for it or give another folder")
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file's content, so that a reader sees the old or the new one, whole."""
    replace_file(path, text.encode("utf-8"))


def replace_file(path: Path, content: bytes) -> None:
    """`write_atomically` of bytes."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.learning_rate": 1e-5, ...}` of nested mappings, with JSON values."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mappings that `flatten` was given."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, field = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[field] = tuple(value) if isinstance(value, list) else value
    return nested


def _check_config(workdir: Path, config: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if not path.exists() or not any(entry.name.isdigit() for entry in (workdir / "checkpoints").glob("*")):
        return  # no round was finished: there is nothing to continue, and a mended config may take the folder over
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; restore it or give another --workdir") from None
    differ = [
        f"{name}: {before.get(name)!r} there, {config.get(name)!r} now"
        for name in sorted(before.keys() | config.keys())
        if name not in MAY_DIFFER and before.get(name) != config.get(name)
    ]
    if differ:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differ)});"
            " give the same config to continue it, or another --workdir"
        )
