"""Does a recipe learn? Several seeds, beside a control whose rewards are dealt to the wrong pictures.

python -m benchmarks.recipes --config=configs/quickstart.py --seeds=0,1,2 --workdir=runs/check --picture=runs/check.png

Prints a Markdown table: of each run the mean reward at fixed prompts and noise before and after, of several experts
also each one's, and the gain in standard deviations over the pictures of the model before training. The evaluations of
the control are by the true rewards. What was trained before is not trained again. With --picture, draws them as curves
beside pictures before and after.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.picture import write_picture
from ddpo_jax.config import run_name
from ddpo_jax.report import told
from ddpo_jax.report.told import Row

SHUFFLED = {"true": "false", "shuffled": "true"}


def run(config: str, workdir: Path, seed: int, shuffled: str, overrides: list[str]) -> None:
    """Trains; ends with the run's own exit status where it fails, as it has said why."""
    status = subprocess.run(
        [
            *(sys.executable, "-m", "ddpo_jax.main", f"--config={config}", f"--workdir={workdir}"),
            *(f"--config.seed={seed}", f"--config.reward.shuffled={shuffled}", *overrides),
        ],
        check=False,
    ).returncode
    if status:
        sys.exit(status)


def cells(rows: list[Row], experts: list[str]) -> tuple[str, str]:
    """The mean reward before and after, with each expert's if there are several, and its gain."""
    before, *_, after = rows
    columns = {"": "reward/mean"}
    if len(experts) > 1:
        columns |= {f"{name.rpartition(':')[2]} ": f"reward/{name}" for name in experts}
    means = (f"{name}{told.digits(before[key])} → {told.digits(after[key])}" for name, key in columns.items())
    return ", ".join(means), told.signed(told.gain(before, after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe, with :VARIANT if wanted")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=Path, required=True, help="one run a folder in it")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    flags, overrides = parser.parse_known_args()
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    recipe = run_name(flags.config)
    workdirs = {kind: [flags.workdir / f"{recipe}-{kind}-{seed}" for seed in seeds] for kind in SHUFFLED}
    table = []
    for kind, shuffled in SHUFFLED.items():
        for seed, workdir in zip(seeds, workdirs[kind], strict=True):
            run(flags.config, workdir, seed, shuffled, overrides)
            run_told = told.read(workdir)
            header = [column for name in run_told.evaluations for column in (told.SETS[name], "gain")]
            evaluations = run_told.evaluations.values()
            experts = list(told.reward_weights(run_told))
            table.append([kind, str(seed), *(cell for rows in evaluations for cell in cells(rows, experts))])
    for line in (["reward", "seed", *header], ["---"] * len(table[0]), *table):
        print(f"| {' | '.join(line)} |")
    if flags.picture:
        write_picture(flags.picture, workdirs)


if __name__ == "__main__":
    main()
