"""What a slow reward on the host costs: epochs beside one that sleeps for as long as a chunk's rollout takes.

python -m benchmarks.overlap --config=configs/quickstart.py --config.sample.chunk_size=16

Epochs with a free reward and with the sleeping one, in turn; the model and its programs are the same. The last line is
the ratio of the sleeping epoch to a free one and one chunk's scoring: 1 where all scoring but the last chunk's goes on
beside the rollouts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from benchmarks import overlap
from benchmarks.rounds import begin, collect, learn
from ddpo_jax.command import fail
from ddpo_jax.config import parse
from ddpo_jax.errors import UserError
from ddpo_jax.methods import method_of

EPOCHS = 5  # of each
NAP = [0.0]  # seconds that a chunk's scores take


def score(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """Brightness, after a nap."""
    time.sleep(NAP[0])
    return images.mean(axis=(1, 2, 3))


def main(argv: Sequence[str]) -> None:
    config, *_ = parse([*argv, "--config.reward.name=benchmarks.overlap:score"])
    ready = begin(config)
    num_chunks = -(-method_of(config).drawn(config) // (ready.run.parts.chunk_size * ready.run.layout.num_shards))

    def epoch(nap: float) -> tuple[float, float]:
        """Seconds of sampling and scoring, and of all."""
        nonlocal ready
        overlap.NAP[0] = nap
        begun = time.monotonic()
        batch, ready = collect(ready, ready.run.draw(int(ready.state.epoch)))
        collected = time.monotonic()
        ready = learn(ready, batch)
        return collected - begun, time.monotonic() - begun

    epoch(0.0)  # compiles
    nap = epoch(0.0)[0] / num_chunks
    free, slow = zip(*((epoch(0.0)[1], epoch(nap)[1]) for _ in range(EPOCHS)), strict=True)
    told = {"chunks": num_chunks, "nap": nap, "free": statistics.median(free), "sleeping": statistics.median(slow)}
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))
    print(f"ratio {told['sleeping'] / (told['free'] + nap):.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail("error", error, 2))
