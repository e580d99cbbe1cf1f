"""Does the quickstart learn? Several seeds, beside a control whose rewards are dealt to the wrong pictures.

python -m benchmarks.quickstart --seeds=0,1,2 --workdir=runs/quickstart-check

Prints a Markdown table: the mean reward at fixed prompts and noise before and after, and the gain in standard
deviations over the pictures of the model before training. Runs that were finished before are only evaluated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from ddpo_jax.rewards.jpeg import jpeg_incompressibility

REWARDS = {"true": "jpeg_incompressibility", "shuffled": "benchmarks.quickstart:shuffled"}


def shuffled(images, prompts):
    """The true rewards of a chunk in an order that has nothing to do with its pictures; their mean is the true one."""
    rewards = jpeg_incompressibility(images, prompts)
    return np.random.default_rng(int(images.sum())).permutation(rewards)


def run(workdir: Path, seed: int, reward: str, overrides: list[str]) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ddpo_jax.main",
            "--config=configs/quickstart.py",
            f"--config.seed={seed}",
            f"--config.reward.name={reward}",
            f"--workdir={workdir}",
            *overrides,
        ],
        check=True,
    )


def gains(workdir: Path) -> dict[str, tuple[float, float, float]]:
    """By prompts: the reward before, after, and the gain in standard deviations before."""
    rows = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    result = {}
    for name in ("train", "held_out"):
        before, *_, after = [row for row in rows if row["prompts"] == name]
        gain = (after["reward/mean"] - before["reward/mean"]) / before["reward/std"]
        result[name] = before["reward/mean"], after["reward/mean"], gain
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=Path, required=True, help="one run a folder in it")
    flags, overrides = parser.parse_known_args()
    lines = ["| reward | seed | train prompts, kB | gain | held-out prompts, kB | gain |", "|---" * 6 + "|"]
    for kind, reward in REWARDS.items():
        for seed in map(int, flags.seeds.split(",")):
            workdir = flags.workdir / f"{kind}-{seed}"
            run(workdir, seed, reward, overrides)
            cells = [f"{before:.3f} → {after:.3f} | {gain:+.2f}" for before, after, gain in gains(workdir).values()]
            lines.append(f"| {kind} | {seed} | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
