"""Reward against compute: rows that are learned from, the compute that a reward took, and the table."""

import math

import numpy as np
import pytest

from benchmarks import fast
from benchmarks.fast import Curve, Job
from ddpo_jax.config import parse


def config_of(variant):
    found = fast.VARIANTS[variant]
    return parse([f"--config={found.config}", *(f"--config.{name}={value}" for name, value in found.changes.items())])[
        0
    ]


@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        *(("faithful", 4), ("window", 1), ("fewer_steps", 3), ("subset", 2)),
        *(("early_steps", 2), ("shared_noise", 4), ("quickstart", 2), ("fast", 1), ("control", 1)),
    ],
)
def test_rows_that_a_variant_learns_from(variant, rows):
    assert fast.rows_per_sample(config_of(variant)) == rows


def test_a_variant_differs_from_the_published_one_by_its_trick():
    published = fast.VARIANTS["faithful"].changes
    for name in ("window", "fewer_steps", "subset", "early_steps", "shared_noise"):
        changed = dict(fast.VARIANTS[name].changes.items() - published.items())
        assert changed and set(changed) <= {
            *("sample.window", "sample.num_steps", "train.timestep_fraction", "train.min_timestep"),
            *("sample.shared_noise", "per_prompt_stat_tracking.buffer_size"),
        }


def test_compute_to_a_reward_is_read_off_the_curve():
    curve = Curve([0, 10, 20, 30], [1.0, 2.0, 1.5, 4.0], {})
    assert fast.compute_to(curve, 1.5) == pytest.approx(5)
    assert fast.compute_to(curve, 2.0) == pytest.approx(10)
    assert fast.compute_to(curve, 2.75) == pytest.approx(25)
    assert fast.compute_to(curve, 4.1) == math.inf


def test_the_table_measures_by_the_quickstart(tmp_path):
    def run(compute, rewards):
        return Curve(list(np.linspace(0, compute, len(rewards))), rewards, {"held_out": 1.0, "train": 2.0})

    curves = {
        Job("faithful", 0): run(8.0, [1.0, 1.5]),
        Job("quickstart", 0): run(4.0, [1.0, 3.0]),
        Job("quickstart", 1): run(4.0, [1.0, 2.0]),
        Job("fast", 0): run(2.0, [1.0, 2.5]),
        Job("fast", 1): run(2.0, [1.0, 4.0]),
        Job("control", 0): run(2.0, [1.0, 1.0]),
    }
    header, _, *lines = fast.table(curves)
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines}
    assert "TFLOP to 2.500" in header
    assert rows["faithful"][-2:] == ["not reached", "–"] and rows["control"][-2:] == ["not reached", "–"]
    assert rows["quickstart"][-2:] == ["3.000 (1 of 2 seeds)", "75%"]
    assert rows["fast"][-2:] == ["1.500 (1.000 to 2.000)", "38% (25% to 50%)"]
    fast.draw(tmp_path / "picture.png", curves)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_runs_that_were_trained_otherwise_are_told_apart():
    """But for the seed, what only rounds, and what one of them did not know yet."""
    config = {"seed": 0, "train.learning_rate": 1e-4, "train.remat": "none", "sample.num_steps": 4}
    alike = {
        "seed": 1,
        "train.learning_rate": 1e-4,
        "train.remat": "products",
        "sample.window": 0,
        "sample.num_steps": 4,
    }
    assert fast.differing(config, alike) == []
    assert fast.differing(config, alike | {"sample.num_steps": 5, "train.learning_rate": 1e-5}) == [
        "sample.num_steps",
        "train.learning_rate",
    ]
