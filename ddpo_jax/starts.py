"""How a run was started, each time: the command, and what it ran on."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ddpo_jax.metrics import append

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def keep_start(workdir: Path, argv: Sequence[str], *, epoch: int) -> None:
    """Adds a start before round `epoch` to starts.jsonl. argv: the arguments after the program's name."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append(workdir / "starts.jsonl", {"epoch": epoch, "utc": now, "command": command(argv), **environment()})


def command(argv: Sequence[str], module: str = "main") -> str:
    """The line to type in a shell for the same again. A home folder is `"$HOME"`: its name is nobody's business."""
    return " ".join([f"python -m ddpo_jax.{module}", *map(_quote, argv)])


def _quote(argument: str) -> str:
    home = str(Path.home())
    if len(home) < 2 or home not in argument:  # a home of / is in every path
        return shlex.quote(argument)
    return '"$HOME"'.join(shlex.quote(piece) if piece else "" for piece in argument.split(home))


def environment() -> dict[str, Any]:
    """What results and speed may depend on; nothing that names the machine or its user."""
    devices = jax.devices()
    return {
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in PACKAGES},
        "devices": (f"{len(devices)} x " if len(devices) > 1 else "") + devices[0].device_kind,
        "processes": jax.process_count(),
    }
