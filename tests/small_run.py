"""Runs on the small folder: configs of a few steps, and a round by hand."""

import threading
from contextlib import contextmanager

import jax
import numpy as np

from configs import base
from ddpo_jax.clock import COMPILE
from ddpo_jax.update import Schedule, optimize

SAMPLES, STEPS = 8, 4

# One shape for all, so that the tests share compiled programs.
SMALL = {
    "mesh.data": 1,
    "eval_prompts": 4,
    "sample.num_steps": STEPS,
    "sample.num_prompts": SAMPLES,
    "sample.chunk_size": SAMPLES,
    "train.num_updates": 2,
    "train.micro_batch_size": 8,
    "train.learning_rate": 1e-3,
    "train.clip_range": 5e-3,
    "per_prompt_stat_tracking.buffer_size": 0,
    "reward.name": "scorers:brightness",
}


def small_config(folder, **changes):
    """configs/base.py on the small folder, with other fields: `**{"train.lora_rank": 2}`."""
    config = base.get_config().lock()
    config.update_from_flattened_dict({"pretrained.model": str(folder), **SMALL, **changes})
    return config


@contextmanager
def silent(name, total):
    """A phase that says nothing."""
    yield lambda count: None


@contextmanager
def compiled():
    """(name, whether on the main thread) of each program that is compiled, or read from the cache, as they come."""
    told = []

    def listen(event, seconds, fun_name="", **_):
        if event == COMPILE:
            told.append((fun_name, threading.current_thread() is threading.main_thread()))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield told
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def passing(scalars):
    """A check of the first update that finds nothing wrong."""


def learn(
    update,
    algorithm,
    state,
    frozen,
    batch,
    *,
    num_updates=2,
    num_inner_epochs=1,
    fraction=1.0,
    phase=silent,
    check=passing,
):
    """`optimize` of one round."""
    return optimize(
        update,
        algorithm,
        state,
        frozen,
        batch,
        jax.random.key(2),
        schedule=Schedule(num_updates, num_inner_epochs, fraction, SMALL["train.micro_batch_size"]),
        seed=(0, 0),
        phase=phase,
        check=check,
    )


def distance(tree, other):
    """Norm of the difference over the norm of the second."""
    difference = sum(np.sum((np.asarray(a) - b) ** 2) for a, b in pairs(tree, other))
    return float(np.sqrt(difference / sum(np.sum(np.asarray(b) ** 2) for _, b in pairs(tree, other))))


def equal(tree, other):
    return all(np.array_equal(a, b) for a, b in pairs(tree, other))


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def pairs(tree, other):
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
