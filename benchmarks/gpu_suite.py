"""DDPO and Diffusion-DPO of Stable Diffusion 1.5 and XL at full size, with random weights, on one GPU.

python -m benchmarks.run --suite=gpu --output=runs/bench-gpu --budget_seconds=500
python -m benchmarks.run --suite=gpu --output=runs/bench-gpu-tiny --sizes=tiny   # on CPU: that it works, not how fast

Rollout, update, end to end and pairs a second, MFU, the device's idle share, where its time goes by kind of operation,
cold and cached compilation, and peak memory, over what is trained, batch sizes, train.remat and attention's kernels.
Cells are measured in order of worth, each in a process of its own. What the budget has no time for is listed as left
out; what there is no memory for too. A cell that results.json has is not measured again, so that a second call goes on.

The models' FLOPs are counted on the host before anything is measured, which takes minutes and is not on the budget:
--budget_seconds=0 counts them alone, on any machine, and a results.json with them can be carried to the GPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import flops, gpu_results
from benchmarks.gpu_cell import config_of, model_of
from benchmarks.gpu_cells import CELLS, SIZES, Cell

ROOT = Path(__file__).parent.parent
# Seconds below which no cell is begun: it would not compile one program.
LEAST = 45
ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"}


def measure(cell: Cell, sizes: str, *, device: str | None, cache: Path, seconds: float) -> dict[str, Any]:
    """What the cell's process found in so many seconds at most. device: that it has to be, if any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        job = {"cell": list(cell), "sizes": sizes, "device": device, "path": str(path), "cache": str(cache)}
        command = [sys.executable, "-m", "benchmarks.gpu_cell", json.dumps(job)]
        begin, failure = time.monotonic(), {}
        try:
            subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | os.environ, check=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            failure = {"status": "cut off", "why": f"after {seconds:.0f} s, the end of the budget"}
        except subprocess.CalledProcessError as error:
            failure = {"status": "failed", "why": f"exit status {error.returncode}; its message is above"}
        found = json.loads(path.read_text()) if path.exists() else {}
        return found | failure | {"seconds": time.monotonic() - begin}


def count_flops(cells: Sequence[Cell], sizes: str, known: Collection[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """The kinds of cells with the FLOPs of a picture and of a row, but for those that are known by then."""
    jax.config.update("jax_platforms", "cpu")  # nothing is run, and the GPU is left to the cells
    for cell in cells:
        name = gpu_results.work_name(cell)
        if name not in known:
            begin, size = time.monotonic(), SIZES[sizes][cell.model]
            xla = cell._replace(attention="xla")
            yield name, flops.work(config_of(xla, size), model_of(size))._asdict()
            tell(f"{name}: FLOPs counted in {time.monotonic() - begin:.0f} s")


def wanted(names: str, sizes: str) -> list[Cell]:
    """The cells with these names, with commas between; all where there are none."""
    known = {cell.name: cell for cell in CELLS[sizes]}
    chosen = [name for name in names.split(",") if name] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"--cells={unknown[0]}: expected one of {', '.join(known)}")
    return [known[name] for name in chosen]


def summary(name: str, results: Mapping[str, Any]) -> str:
    """One line of what was found of a cell."""
    found = results["cells"][name]
    figures = gpu_results.rate_row(name, results) if found.get("programs") else {}
    shown = [f"{column} {figure}" for column, figure in figures.items() if column != "cell" and figure != "–"]
    why = f" ({found['why']})" if "why" in found else ""
    return "; ".join([f"{name}: {found['status']}{why}", *shown, f"{found.get('seconds', 0):.0f} s"])


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run --suite=gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--sizes", choices=SIZES, default="full", help="tiny: shrunk networks, for a machine without GPU"
    )
    parser.add_argument("--cells", default="", help="names, with commas between; all by default")
    parser.add_argument("--again", action="store_true", help="measure what results.json has, too")
    parser.add_argument("--budget_seconds", type=float, default=500, help="for all cells together")
    flags = parser.parse_args(argv)
    flags.output.mkdir(parents=True, exist_ok=True)
    cells = wanted(flags.cells, flags.sizes)
    results = gpu_results.read(flags.output, flags.sizes)
    for name, work in count_flops(cells, flags.sizes, results["flops"].keys()):
        results["flops"][name] = work
        gpu_results.write(flags.output, results)
    end = time.monotonic() + flags.budget_seconds
    with tempfile.TemporaryDirectory() as cache:
        for cell in cells:
            before = results["cells"].get(cell.name, {})
            if before.get("status") in ("measured", "out of memory") and not flags.again:
                continue
            left = end - time.monotonic()
            found = {"status": "skipped", "why": "no time was left"}
            if left >= LEAST:
                device = gpu_results.device_of(results)
                found = measure(cell, flags.sizes, device=device, cache=Path(cache), seconds=left)
            if gpu_results.timed(found) >= gpu_results.timed(before):  # else what there was says more
                results["cells"][cell.name] = cell._asdict() | found
            gpu_results.write(flags.output, results)
            tell(summary(cell.name, results))
    tell(f"{flags.output / 'results.md'}")
