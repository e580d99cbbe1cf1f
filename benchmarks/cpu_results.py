"""What benchmarks.cpu_suite found, as numbers and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpo_jax.workdir import write_atomically

PARTIES = {"ours": "ddpo_jax", "trl": "TRL", "torch": "best torch"}
PEERS = ("trl", "torch")
PHASES = {"rollout": "rollout, images/s", "update": "update, samples/s", "total": "end to end, samples/s"}


def rate(cell: Mapping[str, Any], party: str, phase: str, clock: str) -> float:
    """Samples a second: the batch over the median of a party's rounds, by "wall" or "cpu" seconds."""
    return cell["batch"] / statistics.median(phases[phase][clock] for phases in cell["rounds"][party])


def ratio(cell: Mapping[str, Any], party: str, phase: str, clock: str) -> float:
    """How many times as fast as this party ours is."""
    return rate(cell, "ours", phase, clock) / rate(cell, party, phase, clock)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole of results.md: how many times as fast ours is in each cell, then everybody's rates."""
    cells, machine = results["cells"], results["machine"]
    lines = [
        "# DDPO on one CPU core, beside torch",
        "",
        f"{machine['cpu']}, {machine['system']}; float32, one thread each, all on one core.",
        "",
        *(f"- {PARTIES[party]}: {named(versions)}" for party, versions in results["versions"].items()),
    ]
    for clock, told in (("cpu", "CPU seconds"), ("wall", "the wall clock")):
        lines += ["", f"How many times as fast as each peer ddpo_jax is, by {told}; below 1 it is slower:", ""]
        names = [unit.partition(",")[0] for unit in PHASES.values()]
        lines += head(["batch x steps", *(f"{name} / {PARTIES[peer]}" for peer in PEERS for name in names)])
        for name, cell in cells.items():
            lines.append(row([name, *(f"{ratio(cell, peer, phase, clock):.2f}" for peer in PEERS for phase in PHASES)]))
    lines += ["", "Medians by CPU seconds:", "", *head(["batch x steps", "", *PHASES.values(), "load"])]
    for name, cell in cells.items():
        for party, told in PARTIES.items():
            rates = [f"{rate(cell, party, phase, 'cpu'):.2f}" for phase in PHASES]
            lines.append(row([name, told, *rates, f"{max(cell['load']):.1f}"]))
    return "\n".join(lines) + "\n"


def named(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def head(cells: Sequence[str]) -> list[str]:
    return [row(cells), f"|{'---|' * len(cells)}"]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "results.md", markdown(results))


def read(output: Path) -> dict[str, Any]:
    """What was written there before, or what there is before anything was measured."""
    file = output / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": {}}


def missing(results: Mapping[str, Any], name: str, repeats: int) -> bool:
    """Whether a cell has fewer rounds than are wanted."""
    return name not in results["cells"] or len(results["cells"][name]["rounds"]["ours"]) < repeats
