"""A restartable training loop for the parts of the embedded model that the project's own algorithms do not train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpo_jax import checkpoint
from ddpo_jax.tiny.render import render
from ddpo_jax.types import PyTree

LOG_EVERY = 50  # steps
SAVE_EVERY = 200


def fit(
    loss: Callable,
    init: Callable,
    make_batch: Callable,
    workdir: Path,
    *,
    num_steps: int,
    learning_rate: float,
) -> PyTree:
    """The parameters after `num_steps` of AdamW with warm-up and cosine decay; continues what `workdir` holds.

    loss: params, batch, key -> scalar, metrics.  init: key -> params.  make_batch: step -> batch, pure.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, num_steps // 10 + 1), num_steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3))

    def start(key):
        params = init(key)
        return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(1), state["step"])
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], batch, key)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    update = jax.jit(update, donate_argnums=0)
    begin = time.monotonic()
    with (
        checkpoint.open_manager(workdir / "checkpoints", keep=2) as manager,
        (workdir / "metrics.jsonl").open("a", encoding="utf-8") as log,
    ):
        state = jax.jit(start)(jax.random.key(0))
        state = checkpoint.restore_latest(manager, state) or state
        first = int(state["step"])
        said = time.monotonic()
        for step, batch in ahead(make_batch, first, num_steps):
            state, metrics = update(state, batch)
            if (step + 1) % LOG_EVERY == 0:
                values = {name: round(float(value), 5) for name, value in metrics.items()}
                left = (time.monotonic() - begin) / (step + 1 - first) * (num_steps - step - 1) / 60
                said, before = time.monotonic(), said
                log.write(json.dumps({"step": step + 1, **values, "seconds": round(said - before, 2)}) + "\n")
                log.flush()
                print(f"{workdir.name} {step + 1}/{num_steps}  {values}  {left:.1f} min left", flush=True)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == num_steps:
                checkpoint.save(manager, step + 1, state)
    return state["params"]


def ahead(make_batch: Callable, first: int, num_steps: int) -> Iterator[tuple[int, PyTree]]:
    """(step, batch) pairs; the next batch is made while the current one trains."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(make_batch, first)
        for step in range(first, num_steps):
            batch = pending.result()
            pending = pool.submit(make_batch, step + 1)
            yield step, batch


def rendered(first: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Pictures [first, first + count) as float32 (b, 64, 64, 3) in [0, 1], and their captions."""
    pictures, captions = zip(*(render(index) for index in range(first, first + count)), strict=True)
    return np.stack(pictures).astype(np.float32) / 255, list(captions)
