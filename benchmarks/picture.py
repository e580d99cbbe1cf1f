"""What a recipe does, in one picture: rewards of several seeds beside the control, and pictures before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ddpo_jax import metrics
from ddpo_jax.report import told
from ddpo_jax.report.pictures import choose
from ddpo_jax.report.told import SETS, Row, Told

SIZE = (9.0, 5.2)  # inches
NUM_PROMPTS = 9  # whose pictures are shown
STYLES = {
    "true": {"color": "#2a78d6", "label": "trained, a line a seed"},
    "shuffled": {"color": "#9a9a94", "label": "control: rewards of the wrong pictures"},
}


def write_picture(path: Path, workdirs: Mapping[str, Sequence[Path]]) -> None:
    """Writes a PNG.

    workdirs: of finished runs, by kind: "true" and "shuffled". The pictures are of the first true one, at held-out
    prompts if it has any; the first of each prompt, none chosen by how it looks.
    """
    runs = {kind: [told.read(workdir) for workdir in found] for kind, found in workdirs.items()}
    first = runs["true"][0]
    figure = Figure(figsize=SIZE, layout="constrained")
    above, below = figure.subfigures(2, 1)
    curves = above.subplots(1, len(first.evaluations), sharey=True, squeeze=False)[0]
    for axes, name in zip(curves, first.evaluations, strict=True):
        _draw_curves(axes, name, runs)
    curves[0].set_ylabel(f"mean {told.reward_sum(first)}")
    curves[0].legend(frameon=False, fontsize="small", loc="upper left")
    _draw_pictures(below, first.workdir, next(iter(first.evaluations.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_curves(axes: Axes, name: str, runs: Mapping[str, Sequence[Told]]) -> None:
    for kind, found in reversed(runs.items()):
        for i, run in enumerate(found):
            rows = run.evaluations[name]
            style = STYLES[kind] if i == 0 else STYLES[kind] | {"label": None}
            axes.plot([row["epoch"] for row in rows], [row["reward/mean"] for row in rows], "o-", markersize=4, **style)
    axes.set(title=f"{SETS[name]}, fixed noise", xlabel="rounds done")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_pictures(figure: SubFigure, workdir: Path, rows: Sequence[Row]) -> None:
    before, after = rows[0], rows[-1]
    chosen = choose(before["texts"], NUM_PROMPTS)
    lines = figure.subplots(2, len(chosen), squeeze=False)
    for line, row, when in zip(lines, (before, after), ("before", f"after {after['epoch']} rounds"), strict=True):
        with Image.open(metrics.grid_path(workdir, row["prompts"], row["epoch"])) as sheet:
            tiles = metrics.cut(sheet, len(row["texts"]))
        for axes, i in zip(line, chosen, strict=True):
            axes.imshow(tiles[i], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(when)
    for axes, i in zip(lines[1], chosen, strict=True):
        axes.set_xlabel(before["texts"][i])
