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
from contextlib import contextmanager

import jax
import numpy as np
from jaxtyping import Float

from benchmarks import overlap
from ddpo_jax.build import build, init_state
from ddpo_jax.command import fail
from ddpo_jax.config import parse
from ddpo_jax.errors import UserError
from ddpo_jax.methods import method_of
from ddpo_jax.update import make_update, optimize

EPOCHS = 5  # of each
NAP = [0.0]  # seconds that a chunk's scores take


def score(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """Brightness, after a nap."""
    time.sleep(NAP[0])
    return images.mean(axis=(1, 2, 3))


@contextmanager
def silent(name, total):
    """A phase that says nothing."""
    yield lambda count: None


def main(argv: Sequence[str]) -> None:
    config, *_ = parse([*argv, "--config.reward.name=benchmarks.overlap:score"])
    run = build(config, silent)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    state = init_state(run, seed=config.seed, ema=False)
    num_chunks = -(-method_of(config).drawn(config) // (run.parts.chunk_size * run.layout.num_shards))

    def epoch(number: int, nap: float) -> tuple[float, float]:
        """Seconds of sampling and scoring, and of all."""
        nonlocal state
        overlap.NAP[0] = nap
        key, begun = jax.random.key(number), time.monotonic()
        batch, carry, _ = run.algorithm.collect(state.params, run.frozen, run.draw(number), state.carry, key)
        collected = time.monotonic()
        state, _ = optimize(
            update,
            run.algorithm,
            state._replace(carry=carry),
            run.frozen,
            batch,
            key,
            schedule=run.schedule,
            seed=(config.seed, number),
            phase=silent,
            check=lambda first: None,
        )
        jax.block_until_ready(state.params)
        return collected - begun, time.monotonic() - begun

    epoch(0, 0.0)  # compiles
    nap = epoch(1, 0.0)[0] / num_chunks
    free, slow = zip(*((epoch(2 * i, 0.0)[1], epoch(2 * i + 1, nap)[1]) for i in range(1, EPOCHS + 1)), strict=True)
    told = {"chunks": num_chunks, "nap": nap, "free": statistics.median(free), "sleeping": statistics.median(slow)}
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))
    print(f"ratio {told['sleeping'] / (told['free'] + nap):.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail("error", error, 2))
