"""Rounds of training as train.py makes them, for benchmarks that time their parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.build import Run, build, init_state
from ddpo_jax.types import PyTree, TrainState
from ddpo_jax.update import Update, make_update, optimize


class Ready(NamedTuple):
    """A run about to begin the round `state.epoch`."""

    run: Run
    update: Update
    seed: int
    state: TrainState


@contextmanager
def silent(name: str, total: int) -> Iterator:
    """A phase that says nothing."""
    yield lambda count: None


def begin(config: ConfigDict) -> Ready:
    run = build(config, silent)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    state = init_state(run, seed=config.seed, ema=False)
    if not (run.tuning.reads_pretrained or run.algorithm.reads_reference):
        run = run._replace(frozen=run.frozen._replace(denoiser=None))
    return Ready(run, update, config.seed, state)


def collect(ready: Ready, inputs: PyTree) -> tuple[PyTree, Ready]:
    """What a round learns from: pictures drawn and scored, or a data set's encoded."""
    run, state = ready.run, ready.state
    batch, carry, _ = run.algorithm.collect(state.params, run.frozen, inputs, state.carry, _keys(ready)[0])
    return batch, ready._replace(state=state._replace(carry=carry))


def learn(ready: Ready, batch: PyTree) -> Ready:
    """After the round's updates, which the device has made by then. What `ready` has learned is donated."""
    run, epoch = ready.run, int(ready.state.epoch)
    state, _ = optimize(
        ready.update,
        run.algorithm,
        ready.state,
        run.frozen,
        batch,
        _keys(ready)[1],
        schedule=run.schedule,
        seed=(ready.seed, epoch),
        phase=silent,
        check=run.algorithm.check,
    )
    jax.block_until_ready(state.params)
    return ready._replace(state=state._replace(epoch=np.array(epoch + 1, np.int32)))


def _keys(ready: Ready) -> jax.Array:
    return jax.random.split(jax.random.key(int(ready.state.epoch)))
