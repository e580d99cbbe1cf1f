"""What a workdir tells of its run, and the words for it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_jax import metrics
from ddpo_jax.config import from_data

SETS = {"held_out": "held-out prompts", "train": "train prompts"}  # by their names in evaluations.jsonl

Row = dict[str, Any]


class Told(NamedTuple):
    """The files, read."""

    workdir: Path
    config: Row
    rounds: list[Row]
    evaluations: dict[str, list[Row]]  # by set, in the order of SETS; those that were made
    starts: list[Row]


def read(workdir: Path) -> Told:
    """What the folder's files tell.

    Raises:
        OSError, ValueError: there is no run in it.
    """
    rows = metrics.read(workdir / "evaluations.jsonl")
    evaluations = {name: [row for row in rows if row["prompts"] == name] for name in SETS}
    return Told(
        workdir=workdir.absolute(),
        config=json.loads((workdir / "config.json").read_text(encoding="utf-8")),
        rounds=metrics.read(workdir / "metrics.jsonl"),
        evaluations={name: found for name, found in evaluations.items() if found},
        starts=metrics.read(workdir / "starts.jsonl"),
    )


def result(told: Told) -> str:
    """The run in a sentence or two."""
    sets = [(SETS[name], rows[0], rows[-1]) for name, rows in told.evaluations.items()]
    sets = [(name, *rows) for name, *rows in sets if all(row["reward/mean"] is not None for row in rows)]
    if not sets:
        text = "No evaluation has rewards yet."
    elif sets[0][1] is sets[0][2]:
        said = " and ".join(f"{digits(before['reward/mean'])} for {name}" for name, before, _ in sets)
        text = f"Before training the mean reward is {said}; there is nothing to compare it with yet."
    else:
        said = " and ".join(change(*entry) for entry in sets)
        text = (
            f"At the same prompts and noise the mean reward went {said}, where σ is the standard deviation of the base"
            " model's pictures."
        )
    losses = [loss for loss in column(told.rounds, "loss") if math.isfinite(loss)]
    if from_data(told.config["algorithm"]) and losses:
        text = f"The mean loss of a round went from {digits(losses[0])} to {digits(losses[-1])}. {text}"
    return text


def change(name: str, before: Row, after: Row) -> str:
    """The mean reward of two evaluations, and the gain in standard deviations over the pictures of the first."""
    first, last = before["reward/mean"], after["reward/mean"]
    deviations = f" ({signed(gain(before, after))} σ)" if before["reward/std"] else ""
    return f"from {digits(first)} to {digits(last)} for {name}{deviations}"


def gain(before: Row, after: Row) -> float:
    """The rise in standard deviations over the pictures of the first evaluation; NaN if there is none."""
    if not before["reward/std"] or after["reward/mean"] is None:
        return math.nan
    return (after["reward/mean"] - before["reward/mean"]) / before["reward/std"]


def prompt_means(row: Row) -> dict[str, float]:
    """The mean reward of each prompt's pictures in an evaluation; NaN where all are missing."""
    found: dict[str, list[float]] = {text: [] for text in row["texts"]}
    for text, reward in zip(row["texts"], row["rewards"], strict=True):
        if reward is not None:
            found[text].append(reward)
    return {text: sum(rewards) / len(rewards) if rewards else math.nan for text, rewards in found.items()}


def reward_weights(told: Told) -> dict[str, float]:
    """The weight of each expert; one of weight 0 is only watched."""
    names = [name.strip() for name in told.config["reward.name"].split(",")]
    return dict(zip(names, told.config["reward.weights"] or [1.0] * len(names), strict=True))


def reward_sum(told: Told) -> str:
    """The reward as its config puts it together, without what is only watched."""
    config = told.config
    named = (
        (f"z({name})" if config.get("reward.standardise") else name, w) for name, w in reward_weights(told).items()
    )
    terms = [name if weight == 1 else f"{weight:g} × {name}" for name, weight in named if weight]
    minimum = config.get("reward.combine") == "minimum" and len(terms) > 1
    gates = "".join(f", gated by {gate}" for gate in config.get("reward.gates") or ())
    return (f"min({', '.join(terms)})" if minimum else " + ".join(terms)) + gates


def column(rows: Sequence[Row], key: str) -> list[float]:
    """A column with NaN for what is missing."""
    values = (row.get(key) for row in rows)
    return [math.nan if value is None else float(value) for value in values]


def phases(told: Told) -> list[str]:
    """The columns of seconds."""
    return list(dict.fromkeys(key for row in told.rounds for key in row if key.startswith("seconds/")))


def rounds_done(told: Told) -> int:
    return told.rounds[-1]["epoch"] + 1 if told.rounds else 0


def moment(epoch: int) -> str:
    """When an evaluation was."""
    if epoch == 0:
        return "before training"
    return f"after {epoch} round{'s' if epoch > 1 else ''}"


def duration(seconds: float) -> str:
    """In a unit that reads well."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def digits(value: float | None, *, sign: str = "-") -> str:
    """Four digits, also where they are 0, so that figures line up; sign="+" writes a plus too."""
    if value is None or not math.isfinite(value):
        return "missing"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:{sign}.2e}".replace("-", "−")
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 3
    return f"{value:{sign}.{min(max(decimals, 0), 4)}f}".replace("-", "−")


def signed(value: float) -> str:
    """A gain in standard deviations."""
    return f"{value:+.2f}".replace("-", "−")


def public(value: Any) -> str:
    """A value of the config as JSON writes it; strings bare, and without the name of the home folder."""
    text = value if isinstance(value, str) else json.dumps(value)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
