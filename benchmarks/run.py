"""Speed beside PyTorch peers, at equal work on equal weights.

python -m benchmarks.run --suite=cpu --output=runs/bench-cpu

Writes results.json and results.md to the output folder. A suite has flags of its own: --suite=cpu --help.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = {"cpu": "benchmarks.cpu_suite", "gpu": "benchmarks.gpu_suite"}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--output", type=Path, help="runs/bench-SUITE by default")
    flags, own = parser.parse_known_args(argv)
    output = flags.output or Path("runs") / f"bench-{flags.suite}"
    importlib.import_module(SUITES[flags.suite]).main([f"--output={output}", *own])


if __name__ == "__main__":
    main(sys.argv[1:])
