"""Reward against compute on the embedded model: DDPO as published, what saves work, alone and together.

python -m benchmarks.fast --workdir=runs/fast --seeds=0,1,2,3,4 --picture=runs/fast.png

Every variant trains on the quickstart's problem, with its optimizer and for as many rounds, but for configs/fast.py.
Compute is counted by benchmarks.flops: pictures that are drawn and rows that are learned from, without evaluations. The
reward is that of the evaluations at fixed prompts and fixed noise, the mean of train and held-out prompts; what it has
to reach is what the quickstart ends with, the mean of its seeds. Prints a Markdown table and draws the curves. What was
trained before is not trained again, and the order is seed by seed, so that a part is a comparison too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import flops, programs
from benchmarks.trainings import band, save, spread, train
from configs import base
from ddpo_jax import process, window
from ddpo_jax.report import told
from ddpo_jax.report.told import Told, digits, signed
from ddpo_jax.workdir import MAY_DIFFER

QUICKSTART, FAST = "configs/quickstart.py", "configs/fast.py"
# Published DDPO: all steps, and each prompt's own mean and deviation of all that it has got so far.
PUBLISHED = {
    "sample.shared_noise": "false",
    "per_prompt_stat_tracking.buffer_size": "32",
    "train.min_timestep": "0",
}
EVAL_EVERY = 3  # rounds


class Variant(NamedTuple):
    """What is compared."""

    config: str
    changes: Mapping[str, str]
    what: str
    color: str


def alone(changes: Mapping[str, str], what: str, color: str) -> Variant:
    """One trick, beside what is published."""
    return Variant(QUICKSTART, PUBLISHED | changes, what, color)


VARIANTS = {
    "faithful": alone({}, "as published: every step is noisy and learned from", "#555550"),
    "window": alone({"sample.window": "1"}, "`sample.window=1`, drawn anew in each round", "#2c8f57"),
    "fewer_steps": alone({"sample.num_steps": "3"}, "`sample.num_steps=3` instead of 4", "#8a4fbf"),
    "subset": alone({"train.timestep_fraction": "0.5"}, "`train.timestep_fraction=0.5`", "#b8860b"),
    "early_steps": alone({"train.min_timestep": "500"}, "`train.min_timestep=500`: the first two steps", "#d86aa8"),
    "shared_noise": alone(
        {"sample.shared_noise": "true", "per_prompt_stat_tracking.buffer_size": "0"},
        "`sample.shared_noise`: 8 pictures of a draw, compared among themselves",
        "#3aa6b9",
    ),
    "quickstart": Variant(QUICKSTART, {}, "`configs/quickstart.py`: shared noise, the first two steps", "#2a78d6"),
    "fast": Variant(FAST, {}, "`configs/fast.py`: a window of the first step, twice the learning rate", "#c2571a"),
    "control": Variant(
        FAST, {"reward.shuffled": "true"}, "`configs/fast.py`, rewards of the wrong pictures", "#c2571a"
    ),
}


class Job(NamedTuple):
    """One training."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


class Curve(NamedTuple):
    """What a run gave for its work, at its evaluations."""

    compute: list[float]  # TFLOP
    reward: list[float]  # mean of train and held-out prompts
    gains: dict[str, float]  # by set, in σ of its own pictures before training


def jobs_of(variants: Sequence[str], seeds: Sequence[int], control_seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        yield from (Job(name, seed) for name in variants if name != "control" or seed in control_seeds)


def config_of(run: Told) -> ConfigDict:
    """The config that a run was trained with."""
    config = base.get_config()
    config.update_from_flattened_dict(run.config)
    return config


def differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields that two runs were not trained alike in, but for the seed."""
    common = config.keys() & other.keys() - {"seed", *MAY_DIFFER}  # a run from before a field has none
    return sorted(name for name in common if config[name] != other[name])


def rows_per_sample(config: ConfigDict) -> int:
    """Denoising steps of a picture that are learned from in a pass."""
    _, schedule = programs.read_model(config)
    timesteps = np.asarray(process.ddim(schedule).timesteps(config.sample.num_steps))
    noisy = window.make(
        timesteps,
        size=config.sample.window,
        start=config.sample.window_start,
        min_timestep=config.train.min_timestep,
    )(jax.random.key(0))
    learned = timesteps[:-1] >= config.train.min_timestep
    count = np.sum(learned if noisy is None else learned & noisy)
    return max(1, round(count * config.train.timestep_fraction))


def tflop_a_round(config: ConfigDict) -> float:
    """Training's own work: pictures drawn and decoded, rows learned from."""
    return flops.ddpo(config).of_round(config, rows_per_sample=rows_per_sample(config)) / 1e12


def curve(run: Told, tflop: float) -> Curve:
    """tflop: of a round."""
    sets = run.evaluations
    epochs = [row["epoch"] for row in next(iter(sets.values()))]
    return Curve(
        compute=[epoch * tflop for epoch in epochs],
        reward=np.mean([told.column(rows, "reward/mean") for rows in sets.values()], axis=0).tolist(),
        gains={name: told.gain(rows[0], rows[-1]) for name, rows in sets.items()},
    )


def compute_to(curve: Curve, reward: float) -> float:
    """TFLOP until the curve, straight between evaluations, first reaches the reward; infinite if it does not."""
    points = list(zip(curve.compute, curve.reward, strict=True))
    for (x, y), (x_next, y_next) in itertools.pairwise(points):
        if y_next >= reward:
            return x + (x_next - x) * max(0.0, (reward - y) / (y_next - y))
    return math.inf


def table(curves: Mapping[Job, Curve]) -> list[str]:
    """A row a variant: means of the seeds, with lowest and highest. The share is of the quickstart's compute."""
    found = by_variant(curves)
    target, whole = goal(found)
    header = [
        "",
        "what",
        "TFLOP",
        "reward at the end",
        "gain, σ: held-out",
        "train",
        f"TFLOP to {digits(target)}",
        "share",
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    for name, own in found.items():
        needed = [compute_to(one, target) for one in own]
        reached = [one for one in needed if math.isfinite(one)]
        missed = f" ({len(reached)} of {len(own)} seeds)" if 0 < len(reached) < len(own) else ""
        cells = [
            name,
            VARIANTS[name].what,
            digits(own[0].compute[-1]),
            spread([one.reward[-1] for one in own]),
            *(spread([one.gains[prompts] for one in own], signed) for prompts in ("held_out", "train")),
            spread(reached) + missed if reached else "not reached",
            spread([one / whole for one in reached], "{:.0%}".format),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_variant(curves: Mapping[Job, Curve]) -> dict[str, list[Curve]]:
    return {
        name: [one for job, one in curves.items() if job.variant == name]
        for name in dict.fromkeys(job.variant for job in curves)
    }


def goal(found: Mapping[str, Sequence[Curve]]) -> tuple[float, float]:
    """The reward that the quickstart ends with, the mean of its seeds, and the TFLOP of its training."""
    ends = [(one.reward[-1], one.compute[-1]) for one in found["quickstart"]]
    reward, compute = np.mean(ends, axis=0)
    return float(reward), float(compute)


def draw(path: Path, curves: Mapping[Job, Curve]) -> None:
    """Writes a PNG: reward against compute, a line a variant."""
    found = by_variant(curves)
    target, _ = goal(found)
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(target, color="#bbb", linewidth=1, linestyle="--", zorder=0)
    for name, own in found.items():
        band(
            axes,
            own[0].compute,
            np.array([one.reward for one in own]),
            color=VARIANTS[name].color,
            label=name.replace("_", " "),
            linestyle=":" if name == "control" else "-",
        )
    axes.annotate(
        "what the quickstart ends with",
        (1, target),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        horizontalalignment="right",
        color="#777",
    )
    axes.set(xlabel="training compute, TFLOP", ylabel="kB of the JPEG: train and held-out prompts, fixed noise")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="one run a folder in it")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the quickstart must be among them")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--control_seeds", default="0", help="those of the seeds that have a control")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--trained", action="store_true", help="of what is trained already, without the rest")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    flags, overrides = parser.parse_known_args()
    seeds, control_seeds = ([int(seed) for seed in of.split(",")] for of in (flags.seeds, flags.control_seeds))
    variants = flags.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"--variants={min(unknown)}: expected some of {', '.join(VARIANTS)}")
    if "quickstart" not in variants:
        parser.error(f"--variants={flags.variants}: the quickstart is missing, which the others are measured by")
    jobs = list(jobs_of(variants, seeds, control_seeds))
    if flags.trained:
        jobs = [job for job in jobs if (flags.workdir / job.name / "export").is_dir()]

    def run(job: Job) -> int:
        variant = VARIANTS[job.variant]
        changes = {"seed": job.seed, "eval_every": EVAL_EVERY, **variant.changes}
        settings = [f"--config.{name}={value}" for name, value in changes.items()]
        return train(variant.config, flags.workdir / job.name, settings, overrides)

    with ThreadPoolExecutor(flags.jobs) as pool:
        statuses = list(pool.map(run, jobs))
    runs = {job: told.read(flags.workdir / job.name) for job, status in zip(jobs, statuses, strict=True) if not status}
    firsts = {job.variant: run for job, run in reversed(runs.items())}
    for job, one in runs.items():
        if differ := differing(one.config, firsts[job.variant].config):
            sys.exit(f"{flags.workdir / job.name}: not trained as other seeds were, by {', '.join(differ)}; delete it")
    if "quickstart" not in firsts:
        parser.error("no run of the quickstart, which the others are measured by")
    work = {variant: tflop_a_round(config_of(run)) for variant, run in firsts.items()}
    curves = {job: curve(run, work[job.variant]) for job, run in runs.items()}
    for line in table(curves):
        print(line)
    if flags.picture:
        draw(flags.picture, curves)
    sys.exit(any(statuses))


if __name__ == "__main__":
    main()
