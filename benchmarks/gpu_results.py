"""What benchmarks.gpu_suite found, as numbers and as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_cells import SIZES, Cell, Size
from benchmarks.operations import KINDS
from benchmarks.predict import CHIPS
from ddpo_jax.workdir import write_atomically

GB = 1e9

NOTES = """\
How the figures are made. All weights and inputs are random; the programs are those of a run, on one device.

- A program's seconds are the median of calls in a row, as a run makes them: one is always under way. Nothing of the
  host's is in them: rewards, tokens, checkpoints.
- Rollout: sampling with guidance 5 and decoding of a chunk. Update: a few micro-batches of (sample, timestep) rows are
  measured, and scaled to all timesteps of a sample, of which each is a row; to it comes a sample's share of an
  optimizer step over {samples} samples. The old log-probs are taken as they are, as of one update a round; with several
  in bfloat16 each row goes through the gradient program once more ("recompute").
- End to end: one sample drawn and learned from, one after the other. A cell that draws none takes the fastest rollout
  of its model and of what is trained.
- DPO: pairs with cached latents, of two pictures each; to it comes a pair's share of an optimizer step over {pairs}.
- MFU: FLOPs of the model's own work (benchmarks/flops.py; what is rematerialised is not counted) a second, over the
  chip's peak in bfloat16.
- Idle: the share of a call's seconds, as above, for which a trace of two calls has no operation on the device. Kinds
  of operations are of the trace, in which CUDA graphs are run operation by operation.
- Peak: what the allocator held at most in the cell's process, compiling included, by the device's own statistics.
- Cold: seconds from a program's Python to its executable with an empty cache, of which "traced" are Python's own, in
  any case; cached: the same once more, with nothing in the process's memory, from what the first left on disk.
"""


class Goal(NamedTuple):
    """A figure to reach on one H200, by SD 1.5."""

    told: str
    value: float
    of: Callable  # name, cell, results -> the figure or None
    method: str = "ddpo"
    trains: str = "full"
    lowest: bool = False  # whether less is better


def cell_of(found: Mapping[str, Any]) -> Cell:
    return Cell(*(found[name] for name in Cell._fields))


def size_of(cell: Cell, results: Mapping[str, Any]) -> Size:
    return SIZES[results["sizes"]][cell.model]


def seconds(found: Mapping[str, Any], program: str) -> float | None:
    """Of one call."""
    return found.get("programs", {}).get(program, {}).get("seconds")


def rollout(name: str, results: Mapping[str, Any]) -> float | None:
    """Images a second."""
    found = results["cells"][name]
    spent = seconds(found, "sample")
    return spent and found["chunk_size"] / spent


def learned(name: str, results: Mapping[str, Any]) -> float | None:
    """Samples a second of all timesteps, or pairs."""
    found = results["cells"][name]
    cell = cell_of(found)
    size, row, step = size_of(cell, results), seconds(found, "accumulate"), seconds(found, "apply")
    if row is None or step is None:
        return None
    rows, shared = (size.num_steps, size.samples) if cell.method == "ddpo" else (1, size.pairs)
    return 1 / (rows * row / cell.micro_batch_size + step / shared)


def update(name: str, results: Mapping[str, Any]) -> float | None:
    return learned(name, results) if results["cells"][name]["method"] == "ddpo" else None


def pairs(name: str, results: Mapping[str, Any]) -> float | None:
    return learned(name, results) if results["cells"][name]["method"] == "dpo" else None


def best_rollout(name: str, results: Mapping[str, Any]) -> float | None:
    """A cell's own, or the fastest of the same model and of what is trained."""
    own = rollout(name, results)
    alike = [
        rollout(other, results)
        for other, found in results["cells"].items()
        if all(found[field] == results["cells"][name][field] for field in ("model", "trains"))
    ]
    return own or max(filter(None, alike), default=None)


def end_to_end(name: str, results: Mapping[str, Any]) -> float | None:
    """Samples a second, drawn and learned from."""
    drawn, taught = best_rollout(name, results), update(name, results)
    return 1 / (1 / drawn + 1 / taught) if drawn and taught else None


def recomputed(name: str, results: Mapping[str, Any]) -> float | None:
    """The same where old log-probs are recomputed: each row goes through the gradient program twice."""
    once, cell = end_to_end(name, results), cell_of(results["cells"][name])
    rows = size_of(cell, results).num_steps / max(1, cell.micro_batch_size)
    return 1 / (1 / once + rows * seconds(results["cells"][name], "accumulate")) if once else None


def compiling(name: str, results: Mapping[str, Any], kind: str) -> float | None:
    """Seconds of all programs of a cell, if it has them all; kind: "cold" or "cached"."""
    found = results["cells"][name].get("programs", {})
    if not {"sample", "accumulate", "apply"} <= found.keys():
        return None
    return sum(program["compile"][kind] for program in found.values())


def cold(name: str, results: Mapping[str, Any]) -> float | None:
    return compiling(name, results, "cold")


def cached(name: str, results: Mapping[str, Any]) -> float | None:
    return compiling(name, results, "cached")


GOALS = (
    Goal("rollout, images/s", 5.9, rollout),
    Goal("update, samples/s", 2.0, update),
    Goal("update with LoRA, samples/s", 2.65, update, trains="lora"),
    Goal("end to end, samples/s", 1.5, end_to_end),
    Goal("end to end with LoRA, samples/s", 1.8, end_to_end, trains="lora"),
    Goal("Diffusion-DPO, pairs/s", 75.0, pairs, method="dpo"),
    Goal("cold compile, s", 90.0, cold, lowest=True),
    Goal("cached compile, s", 10.0, cached, lowest=True),
)


def reached(goal: Goal, results: Mapping[str, Any]) -> tuple[float, str] | None:
    """The best figure, and the name of its cell; None where no cell has it."""
    figures = [
        (figure, name)
        for name, found in results["cells"].items()
        if (found["model"], found["method"], found["trains"]) == ("sd15", goal.method, goal.trains)
        and (figure := goal.of(name, results)) is not None
    ]
    return (min if goal.lowest else max)(figures, default=None)


def ratio(goal: Goal, figure: float) -> float:
    """1 and more: the goal is reached."""
    return goal.value / figure if goal.lowest else figure / goal.value


def mfu(name: str, results: Mapping[str, Any], what: str) -> float | None:
    """The model's own FLOPs a second over the device's peak; what: "rollout" or "row"."""
    found = results["cells"][name]
    cell = cell_of(found)
    program, count = {"rollout": ("sample", cell.chunk_size), "row": ("accumulate", cell.micro_batch_size)}[what]
    chip = next((chip for word, chip in CHIPS.items() if word in found.get("device", "").lower()), None)
    spent, work = seconds(found, program), results["flops"].get(work_name(cell))
    if chip is None or spent is None or work is None:
        return None
    return count * work[what] / spent / chip.flops


def work_name(cell: Cell) -> str:
    """Of what a cell's FLOPs depend on."""
    return f"{cell.model}-{cell.method}-{cell.trains}"


def markdown(results: Mapping[str, Any]) -> str:
    """The whole of results.md: ratios to the goals, rates, compilation, where time goes, and what was not measured."""
    names = [name for name, found in results["cells"].items() if found.get("programs")]
    size = SIZES[results["sizes"]]["sd15"]
    lines = [
        "# Speed of Stable Diffusion's programs on one device",
        "",
        f"{device_of(results) or 'nothing was measured'}; bfloat16, random weights, sizes: {results['sizes']}.",
        *([] if results["sizes"] == "full" else ["The networks are shrunk: no figure here says anything of speed."]),
        *section("Goals on one H200, SD 1.5 at 512 px, 50 steps", goal_rows(results)),
        *section("Rates", [rate_row(name, results) for name in names]),
        *section("Compilation and memory of programs", [row for name in names for row in program_rows(name, results)]),
        *section("Device time by kind of operation", [row for name in names for row in kind_rows(name, results)]),
        *section("Not measured", left_out(results)),
        "",
        NOTES.format(samples=size.samples, pairs=size.pairs),
    ]
    return "\n".join(lines)


def goal_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """None for shrunk networks."""
    rows = []
    for goal in GOALS if results["sizes"] == "full" else ():
        best = reached(goal, results)
        rows.append(
            {
                "figure": goal.told,
                "of the goal": told(best and ratio(goal, best[0])),
                "measured": told(best and best[0]),
                "goal": told(goal.value),
                "cell": best[1] if best else "–",
            }
        )
    return rows


def rate_row(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    found = results["cells"][name]
    idle = {program: figures.get("idle") for program, figures in found["programs"].items()}
    peak = found.get("peak")
    return {
        "cell": name,
        "rollout, images/s": told(rollout(name, results)),
        "MFU": percent(mfu(name, results, "rollout")),
        "idle": percent(idle.get("sample")),
        "update, samples/s": told(update(name, results)),
        "DPO, pairs/s": told(pairs(name, results)),
        "MFU of it": percent(mfu(name, results, "row")),
        "idle of it": percent(idle.get("accumulate")),
        "end to end, samples/s": told(end_to_end(name, results)),
        "with recompute": told(recomputed(name, results)),
        "peak, GB": told(peak and peak / GB),
    }


def program_rows(name: str, results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for program, figures in results["cells"][name]["programs"].items():
        spent = figures.get("seconds")
        yield {
            "cell": name,
            "program": program,
            "traced, s": told(figures["compile"]["traced"]),
            "cold, s": told(figures["compile"]["cold"]),
            "cached, s": told(figures["compile"]["cached"]),
            "a call, ms": told(spent and 1e3 * spent),
            "temporary, GB": told(figures["temporary"] / GB),
        }


def kind_rows(name: str, results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for program, figures in results["cells"][name]["programs"].items():
        spent = figures.get("operations", {})
        if total := sum(spent.values()):
            yield {"cell": name, "program": program} | {kind: percent(spent[kind] / total) for kind in KINDS}


def left_out(results: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"cell": name, "": found["status"], "why": found.get("why", "")}
        for name, found in results["cells"].items()
        if found["status"] != "measured"
    ]


def section(title: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A headed table; nothing where there are no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))]
    return ["", f"## {title}", "", *lines]


def told(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "results.md", markdown(results))


def read(output: Path, sizes: str) -> dict[str, Any]:
    """What was written there before, or what there is before anything was measured.

    Raises:
        SystemExit: it is of other sizes.
    """
    file = output / "results.json"
    if not file.exists():
        return {"sizes": sizes, "flops": {}, "cells": {}}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["sizes"] != sizes:
        sys.exit(f"--output={output}: its figures are of --sizes={found['sizes']}; give another folder")
    return found


def device_of(results: Mapping[str, Any]) -> str | None:
    """What all figures are of; None where there are none."""
    return next((found["device"] for found in results["cells"].values() if found.get("programs")), None)


def timed(found: Mapping[str, Any]) -> int:
    """Programs of a cell that have been timed."""
    return sum("seconds" in program for program in found.get("programs", {}).values())
