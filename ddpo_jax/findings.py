"""What an evaluation found: the statistics, and how the files and the lines on the screen tell of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpo_jax import statistics
from ddpo_jax.drawn import Drawn
from ddpo_jax.report import comparison as report
from ddpo_jax.report.estimates import level, percent, said, sigmas
from ddpo_jax.report.pictures import TINY
from ddpo_jax.report.scores import short
from ddpo_jax.types import Prompts


def weigh(names: Sequence[str], prompts: Prompts, drawn: Sequence[Drawn], labels: Sequence[str]) -> report.Told:
    """The statistics; without what only describes."""
    cluster = np.asarray(prompts.id)
    features = [one.features for one in drawn if one.features is not None]
    if features:
        whole = np.all([np.isfinite(one).all(axis=1) for one in features], axis=0)
        features = [one[whole] for one in features]
    diverse = [statistics.diversity(one, cluster[whole]) for one in features] or [None] * len(drawn)
    sides = tuple(
        report.Side(
            label,
            tuple(statistics.mean(column, cluster) for column in one.scores.T),
            one.scores,
            one.pictures,
            one.size <= TINY,
            its_diversity,
        )
        for label, one, its_diversity in zip(labels, drawn, diverse, strict=True)
    )
    pair = len(drawn) == 2
    return report.Told(
        names=tuple(names),
        texts=prompts.texts,
        sides=sides,
        comparisons=tuple(
            statistics.compare(drawn[0].scores[:, k], drawn[1].scores[:, k], cluster) for k in range(len(names) * pair)
        ),
        diversity=statistics.compare_diversity(*features, cluster[whole]) if pair and features else None,
        facts={},
        notes=(),
        settings={},
    )


def table(told: report.Told, prompts: Prompts, drawn: Sequence[Drawn]) -> str:
    """rewards.csv: a row a picture, or a pair, with the scores of each model; empty where missing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    sides = ("model", "against")[: len(drawn)]
    writer.writerow(
        [
            "index",
            "prompt_id",
            "prompt",
            *(f"{name}/{side}" for name in told.names for side in sides),
            "missing_because",
        ]
    )
    for i, text in enumerate(prompts.texts):
        row = np.stack([one.scores[i] for one in drawn], axis=1).ravel()
        whys = dict.fromkeys(one.whys[i] for one in drawn if one.whys[i])
        scores = ["" if np.isnan(value) else str(value) for value in row]
        writer.writerow([i, int(prompts.id[i]), text, *scores, "; ".join(whys)])
    return file.getvalue()


def plain(told: report.Told, settings: Mapping[str, Any]) -> dict[str, Any]:
    """evaluation.json: the settings, and every number of the page, null where it cannot be told."""
    sides = dict(zip(("model", "against"), told.sides, strict=False))
    return {
        **settings,
        "rewards": {
            expert: {side: listed(one.means[k]) for side, one in sides.items()}
            | (
                {name: listed(value) for name, value in told.comparisons[k]._asdict().items()}
                if told.comparisons
                else {}
            )
            for k, expert in enumerate(told.names)
        },
        "diversity": {side: listed(one.diversity) for side, one in sides.items()}
        | ({"difference": listed(told.diversity)} if told.diversity else {}),
        "notes": list(told.notes),
    }


def listed(value: Any) -> Any:
    """JSON of statistics: tuples by their names, NaN as null."""
    if hasattr(value, "_asdict"):
        return {name: listed(one) for name, one in value._asdict().items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(told: report.Told) -> list[str]:
    """A line an expert, and one on diversity."""
    lines = []
    for k, name in enumerate(told.names):
        means = ", ".join(f"{side.label} {said(level(side.means[k]))}" for side in told.sides)
        text = f"{short(name)}: {means}"
        if told.comparisons:
            one = told.comparisons[k]
            text += f"; difference {said(level(one.difference, sign='+'))}, {said(sigmas(one.sigmas), ' σ')};"
            text += f" win rate {said(percent(one.win_rate))} of {one.count} pairs"
            text += f", {one.missing} missing" if one.missing else ""
        lines.append(text)
    if told.sides[0].diversity:
        found = ", ".join(f"{side.label} {said(level(side.diversity.overall))}" for side in told.sides)
        lines.append(f"diversity: {found}")
    return lines
