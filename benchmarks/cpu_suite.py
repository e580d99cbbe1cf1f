"""DDPO on one CPU core: ddpo_jax beside TRL as it is shipped, and beside the best torch loop that we could write.

python -m benchmarks.run --suite=cpu --output=runs/bench-cpu

All three have the embedded model's weights, the same batch, steps, guidance and reward, compute in float32, and make
one optimizer step a round over the whole batch. Each is a process of its own that is pinned to the same core. Their
rounds are run in turn, A B C A B C, so that what else the machine does hits all alike, and CPU seconds are kept beside
the wall clock's. Before anything is timed the torch parties must draw the same pictures as ours from the same noise,
and have the same log-probs and gradients.

Linux only. The peers' packages go into an environment of their own, made on the first call; TRL 0.23.1 is the last
release with a DDPOTrainer. A cell that is in results.json already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cpu_results
from benchmarks.cpu_results import PARTIES, PHASES, ratio
from benchmarks.peers.protocol import Phases, read_answer

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
MODEL = ROOT / "ddpo_jax" / "assets" / "tiny-sd"
PROMPTS = ROOT / "ddpo_jax" / "assets" / "prompts" / "common_animals.txt"
PACKAGES = ("torch==2.13.0", "trl==0.23.1", "diffusers==0.42.*", "transformers>=5,<6", "accelerate", "peft", "numpy")
SETTINGS = {"guidance_scale": 5.0, "clip_range": 1e-4, "learning_rate": 1e-5}
WARM_UP_STEPS = 2
# How far a torch party may be from ours: pixels of 1, nats, of 1, and of the gradient's norm. TRL's maths are float32
# throughout, of which 1 - ᾱ keeps three digits near the clean end.
TOLERANCE = {"picture": 2 / 255, "log_prob": 1e-4, "ratio": 1e-5, "gradient": 1e-3}


class Cell(NamedTuple):
    """What is measured at a time."""

    batch: int
    num_steps: int
    lora: bool

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.num_steps}-{'lora' if self.lora else 'full'}"


CELLS = tuple(Cell(batch, num_steps, lora) for lora in (False, True) for batch in (16, 64) for num_steps in (10, 20))


# Memory that malloc keeps, as ddpo_jax has it too: 6 % of the torch loop's update.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}


@contextmanager
def party(command: Sequence[str | Path], **variables: str) -> Iterator[Callable]:
    """Starts a process that serves jobs as benchmarks/peers/protocol.py says; gives ask(job, **arguments) -> result.

    Its standard error goes where ours does.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= variables
    process = subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )

    def ask(job: str, **arguments: Any) -> Any:
        with suppress(BrokenPipeError):  # it has ended, and read_answer says so
            process.stdin.write(json.dumps({"job": job, **arguments}) + "\n")
            process.stdin.flush()
        return read_answer(process.stdout.readline())

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def peer_python(folder: Path) -> Path:
    """The Python of the peers' environment, which is made if it is not there, and remade if it is not whole."""
    python, mark = folder / "bin" / "python", folder / "installed"
    if not mark.exists() or mark.read_text() != "\n".join(PACKAGES):
        tell(f"installing {', '.join(PACKAGES)} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        # torch by itself first, at one version: a free range would bring gigabytes of CUDA
        for packages in (PACKAGES[:1], PACKAGES):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        mark.write_text("\n".join(PACKAGES))
    return python


def check_agreement(asks: Mapping[str, Callable], cell: Cell, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far each torch party is from ours in what it computes.

    Raises:
        SystemExit: further than `TOLERANCE`.
    """
    ours, *peers = asks
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "reference.npz")
        reference = asks[ours]("reference", path=path, **job(cell, prompts))
        found = {ours: {"ratio": reference["ratio"]}}
        for name in peers:
            asks[name]("prepare", **job(cell, reference["prompts"]))
            found[name] = asks[name]("check", prompts=reference["prompts"], path=path)
    for name, distances in found.items():
        for what, distance in distances.items():
            if not distance <= TOLERANCE[what]:
                sys.exit(f"{cell.name}: {what} of {name} is off by {distance:.1e}, more than {TOLERANCE[what]:.1e}")
    return found


def measure(asks: Mapping[str, Callable], cell: Cell, prompts: Sequence[str], *, repeats: int) -> dict[str, Any]:
    """The phases of each party's rounds, run in turn after a warm-up, and the load of the machine around them.

    Torch warms up in fewer steps of the same shapes. Ours has to compile the cell's own.
    """
    begun, load = time.monotonic(), [os.getloadavg()[0]]
    for name, ask in asks.items():
        warm_up = cell if name == "ours" else cell._replace(num_steps=WARM_UP_STEPS)
        ask("prepare", **job(warm_up, prompts))
        ask("round")
        if warm_up != cell:
            ask("prepare", **job(cell, prompts))
    warm = time.monotonic()
    rounds: dict[str, list[Phases]] = {name: [] for name in asks}
    for _ in range(repeats):
        for name, ask in asks.items():
            rounds[name].append(ask("round"))
    load.append(os.getloadavg()[0])
    seconds = {"warm-up": warm - begun, "rounds": time.monotonic() - warm}
    return {**cell._asdict(), "load": load, "seconds": seconds, "rounds": rounds}


def job(cell: Cell, prompts: Sequence[str]) -> dict[str, Any]:
    return {"model": str(MODEL), "prompts": list(prompts), **cell._asdict(), **SETTINGS}


def machine() -> dict[str, str]:
    """What the figures are of; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}"}


def summary(cell: Mapping[str, Any]) -> str:
    """One line of a cell's ratios and of the time that it took."""
    told = [
        f"{PARTIES[peer]}: " + ", ".join(f"{phase} {ratio(cell, peer, phase, 'cpu'):.2f}" for phase in PHASES)
        for peer in cpu_results.PEERS
    ]
    return f"ours / {'; '.join(told)}; {sum(cell['seconds'].values()):.0f} s"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cells_of(names: str) -> list[Cell]:
    """The cells with these names, such as "16x10-full,2x2-lora"; all eight where there are none."""
    if not names:
        return list(CELLS)
    found = []
    for name in names.split(","):
        size, _, kind = name.partition("-")
        batch, _, num_steps = size.partition("x")
        if not (re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) and kind in ("full", "lora")):
            sys.exit(f"--cells={name}: expected BATCHxSTEPS-full or BATCHxSTEPS-lora, such as {CELLS[0].name}")
        found.append(Cell(int(batch), int(num_steps), kind == "lora"))
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run --suite=cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cells", default="", help=f"of {', '.join(cell.name for cell in CELLS)}, or other numbers")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds a cell and party")
    parser.add_argument("--core", type=int, help="to run on; the last by default")
    parser.add_argument("--peer_env", type=Path, default=Path("~/.cache/ddpo_jax/peer-venv"))
    flags = parser.parse_args(argv)
    if flags.repeats < 1:
        parser.error(f"--repeats={flags.repeats}: expected 1 or more; 5 is usual")
    if flags.core is not None and flags.core not in os.sched_getaffinity(0):
        parser.error(f"--core={flags.core}: expected one of {sorted(os.sched_getaffinity(0))}")
    flags.output.mkdir(parents=True, exist_ok=True)
    results = cpu_results.read(flags.output)
    cells = [cell for cell in cells_of(flags.cells) if cpu_results.missing(results, cell.name, flags.repeats)]
    if not cells:
        tell(f"{flags.output} has them all")
        return
    prompts, environment = PROMPTS.read_text(encoding="utf-8").splitlines(), flags.peer_env.expanduser()
    peer = peer_python(environment)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(environment / "compiled"))
    # Inherited by all parties, before they import what counts the cores.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if flags.core is None else flags.core})
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.cpu_party"],
        "trl": [peer, "-E", PEERS / "trl_party.py"],
        "torch": [peer, "-E", PEERS / "torch_party.py"],
    }
    with ExitStack() as stack:
        own = {"torch": KEEP_FREED_MEMORY}
        asks = {name: stack.enter_context(party(command, **own.get(name, {}))) for name, command in commands.items()}
        here = {"machine": machine(), "versions": {name: ask("versions") for name, ask in asks.items()}}
        if results["cells"] and any(results[what] != told for what, told in here.items()):
            sys.exit(
                f"--output={flags.output}: its cells are of another machine or other versions; give another folder"
            )
        results |= here
        results.setdefault("agreement", {})
        for lora in dict.fromkeys(cell.lora for cell in cells):
            of_kind = [cell for cell in cells if cell.lora == lora]
            smallest = min(of_kind)
            results["agreement"][smallest.name] = check_agreement(asks, smallest, prompts)
            tell(f"{smallest.name}: all agree: {json.dumps(results['agreement'][smallest.name])}")
            for cell in of_kind:
                results["cells"][cell.name] = measure(asks, cell, prompts, repeats=flags.repeats)
                cpu_results.write(flags.output, results)
                tell(f"{cell.name}: {summary(results['cells'][cell.name])}")
