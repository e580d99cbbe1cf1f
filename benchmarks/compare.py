"""Every method on the embedded model at equal numbers of reward queries, like Fig. 4 of Black et al. 2023.

python -m benchmarks.compare --workdir=runs/compare --picture=runs/compare.png

Trains the recipes of configs/compare/ with several seeds, each beside a control: the rewards of the wrong pictures; of
reward_backprop, half of the pictures teach the opposite. Reward-weighted regression has a second one, in which all
weights are the same. Prints a Markdown table of what held-out prompts give at fixed noise, and draws the curves. What
was trained before is not trained again, and the order is seed by seed, so that a part is a comparison too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.trainings import band, save, spread, train
from ddpo_jax.report import told
from ddpo_jax.report.told import Told, signed

COLORS = {
    "ddpo_is": "#2a78d6",
    "ddpo_sf": "#7bb0ea",
    "rwr": "#c2571a",
    "sparse_rwr": "#e8a26f",
    "online_dpo": "#2c8f57",
    "reward_backprop": "#8a4fbf",
}
CONTROLS = {"shuffled": ["--config.reward.shuffled=true"], "uniform": ["--config.rwr.temperature=1e30"]}
PANELS = {
    "reward/jpeg_incompressibility_estimate": "reward that is learned from (kB, estimated)",
    "reward/jpeg_incompressibility": "watched: kB of the JPEG file",
    "reward/ddpo_jax.tiny.judge:recognised": "watched: animal recognised",
}
SIZE = (13.0, 4.6)  # inches


class Job(NamedTuple):
    """One training."""

    method: str
    kind: str  # "true", or a control
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.kind}-{self.seed}"


def jobs_of(
    methods: Sequence[str], seeds: Sequence[int], controls: Sequence[str], control_seeds: Sequence[int]
) -> Iterator[Job]:
    """Seed by seed, and of each the controls after what they control."""
    for seed in seeds:
        for kind in ("true", *(controls if seed in control_seeds else ())):
            yield from (Job(method, kind, seed) for method in methods if kind != "uniform" or method == "rwr")


def train_one(job: Job, workdir: Path, overrides: Sequence[str]) -> int:
    """The exit status of a job's training."""
    settings = [f"--config.seed={job.seed}", *CONTROLS.get(job.kind, ())]
    return train(f"configs/compare/{job.method}.py", workdir / job.name, settings, overrides)


def queries(run: Told) -> int:
    """Pictures whose reward a round asks for."""
    return run.config["sample.num_prompts"] * run.config["sample.num_samples_per_prompt"]


def table(runs: Mapping[Job, Told]) -> list[str]:
    """A row a method: the mean of the seeds, with the lowest and the highest; the gain in σ of the base's pictures."""
    lines = [
        "| method | reward | gain, σ | control's gain, σ | kB of the file | recognised |",
        "|---|---|---|---|---|---|",
    ]

    for method in dict.fromkeys(job.method for job in runs):
        own = {
            kind: [run for job, run in runs.items() if (job.method, job.kind) == (method, kind)]
            for kind in ("true", *CONTROLS)
        }
        last = [run.evaluations["held_out"][-1] for run in own["true"]]
        gains = {
            kind: [told.gain(run.evaluations["held_out"][0], run.evaluations["held_out"][-1]) for run in found]
            for kind, found in own.items()
        }
        controls = "; ".join(f"{kind} {spread(gains[kind], signed)}" for kind in CONTROLS if gains[kind])
        file, recognised = ([row[key] for row in last] for key in list(PANELS)[1:])
        cells = [
            method,
            spread([row["reward/mean"] for row in last]),
            spread(gains["true"], signed),
            controls or "–",
            spread(file),
            spread(recognised, "{:.0%}".format),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(path: Path, runs: Mapping[Job, Told]) -> None:
    """Writes a PNG: a line a method, the mean of its seeds, in a band from the lowest to the highest."""
    figure = Figure(figsize=SIZE, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for method in dict.fromkeys(job.method for job in runs):
            curve(
                axes,
                key,
                [run for job, run in runs.items() if (job.method, job.kind) == (method, "true")],
                color=COLORS[method],
                label=method,
            )
            curve(
                axes,
                key,
                [run for job, run in runs.items() if job.method == method and job.kind != "true"],
                color=COLORS[method],
                linestyle=":",
                label=None,
            )
        axes.set(title=title, xlabel="reward queries")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].plot([], [], color="#555", linestyle=":", label="controls")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=7)
    figure.axes[0].set_ylabel("held-out prompts, fixed noise")
    save(figure, path)


def curve(axes: Axes, key: str, found: Sequence[Told], *, color: str, label: str | None, linestyle: str = "-") -> None:
    if not found:
        return
    rows = [run.evaluations["held_out"] for run in found]
    count = min(map(len, rows))
    x = [row["epoch"] * queries(found[0]) for row in rows[0][:count]]
    y = np.array([told.column(one[:count], key) for one in rows])
    band(axes, x, y, color=color, label=label, linestyle=linestyle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="one run a folder in it")
    parser.add_argument("--methods", default=",".join(COLORS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--control_seeds", help="those of the seeds that have controls; all by default")
    parser.add_argument("--controls", default=",".join(CONTROLS), help='"" trains none')
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    flags, overrides = parser.parse_known_args()
    methods, controls = flags.methods.split(","), [name for name in flags.controls.split(",") if name]
    seeds, control_seeds = (
        [int(seed) for seed in of.split(",")] for of in (flags.seeds, flags.control_seeds or flags.seeds)
    )
    jobs = list(jobs_of(methods, seeds, controls, control_seeds))
    with ThreadPoolExecutor(flags.jobs) as pool:
        statuses = list(pool.map(lambda job: train_one(job, flags.workdir, overrides), jobs))
    runs = {job: told.read(flags.workdir / job.name) for job, status in zip(jobs, statuses, strict=True) if not status}
    for line in table(runs):
        print(line)
    if flags.picture:
        draw(flags.picture, runs)
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
