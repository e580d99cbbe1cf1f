"""Trainings that a benchmark compares: each in a folder of its own, once, and how their curves are drawn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpo_jax.report.told import digits


def train(config: str, workdir: Path, settings: Sequence[str], overrides: Sequence[str]) -> int:
    """The exit status of the training; its output goes to a file beside the folder.

    What is finished is not begun again, unless there are overrides: then the training itself says whether it fits.
    """
    if (workdir / "export").is_dir() and not overrides:
        return 0
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ddpo_jax.main", f"--config={config}", f"--workdir={workdir}"]
    with workdir.with_name(f"{workdir.name}.log").open("w") as log:
        status = subprocess.run([*command, *settings, *overrides], stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{workdir.name}: {'done' if not status else f'failed with status {status}, see its .log'}", file=sys.stderr)
    return status


def spread(values: Sequence[float], write: Callable[[float], str] = digits) -> str:
    """The mean, with the lowest and the highest where there are several."""
    if not len(values):
        return "–"
    mean = write(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({write(min(values))} to {write(max(values))})"


def band(
    axes: Axes,
    x: Sequence[float],
    y: Float[np.ndarray, "seeds n"],
    *,
    color: str,
    label: str | None,
    linestyle: str = "-",
) -> None:
    """A line, the mean of the seeds; a solid one in a band from the lowest to the highest."""
    axes.plot(x, y.mean(axis=0), linestyle, color=color, label=label, linewidth=1.8 if linestyle == "-" else 1.2)
    if linestyle == "-":
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
