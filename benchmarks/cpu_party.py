"""ddpo_jax as a party of the comparison: the parts that train.py joins, and its two phases timed.

Started by benchmarks.cpu_suite; jobs and answers as in benchmarks/peers/protocol.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from benchmarks.peers.protocol import Phases, serve, timed
from benchmarks.rounds import Ready, begin, collect, learn
from configs import base
from ddpo_jax import convert, runtime
from ddpo_jax.policy import make_policy, make_sampler, sample_keys
from ddpo_jax.starts import environment
from ddpo_jax.types import PyTree
from ddpo_jax.update import plan

# Pictures and rows a program; results do not depend on them. At 16 pictures of 10 steps updates in micro-batches of 8,
# 16 and 32 rows took the same time to a twentieth, and of 4 a tenth more.
CHUNK_SIZE = 16
MICRO_BATCH_SIZE = 16


def brightness(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
    """The mean of each picture."""
    return images.mean(axis=(1, 2, 3))


def make_config(
    *,
    model: str,
    batch: int,
    num_steps: int,
    lora: bool,
    guidance_scale: float,
    clip_range: float,
    learning_rate: float,
    eta: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    micro_batch_size: int = MICRO_BATCH_SIZE,
) -> ConfigDict:
    """One optimizer step a round, over the whole batch; advantages are whitened over it."""
    config = base.get_config().lock()
    config.update_from_flattened_dict(
        {
            "pretrained.model": model,
            "reward.name": "benchmarks.cpu_party:brightness",
            "per_prompt_stat_tracking.buffer_size": 0,
            "sample.num_prompts": batch,
            "sample.num_steps": num_steps,
            "sample.eta": eta,
            "sample.guidance_scale": guidance_scale,
            "sample.chunk_size": chunk_size,
            "train.num_updates": 1,
            "train.lora_rank": 4 if lora else 0,
            "train.clip_range": clip_range,
            "train.learning_rate": learning_rate,
            "train.micro_batch_size": micro_batch_size,
            "train.remat": "none",  # as torch; there is memory enough, and computing again costs a thirtieth
        }
    )
    return config


def one_round(ready: Ready) -> tuple[Ready, Phases]:
    """After one round, and what its phases took."""
    phases = {}
    with timed(phases, "total"):
        with timed(phases, "rollout"):
            batch, ready = collect(ready, ready.run.draw(int(ready.state.epoch)))
        with timed(phases, "update"):
            ready = learn(ready, batch)
    return ready, phases


def write_reference(path: str, config: ConfigDict) -> dict[str, Any]:
    """Writes what the other parties are held to, for this config: pictures, log-probs and a gradient.

    The arrays are torch's: channels before pixels, tensors under diffusers' names. The pictures are drawn without noise
    (eta 0), the transitions with it. Returns the prompts, and the deviation of the importance ratio from 1.
    """
    ready = begin(config)
    run, params = ready.run, moved(ready.state.params)
    key, frozen = jax.random.key(1), run.frozen
    prompts = run.draw(0)
    batch, _, _ = run.algorithm.collect(params, frozen, prompts, ready.state.carry, key)
    grads, deviation = gradient(ready, params, batch)
    settings = {name: config.sample[name] for name in ("num_steps", "guidance_scale")}
    policy = make_policy(run.parts.model, eta=0.0, **settings)
    sample = make_sampler(run.parts.model, policy, run.tuning.merge, layout=run.layout)
    keys = sample_keys(key, np.arange(len(prompts.texts)))
    _, clean, images = sample(params, frozen, prompts.tokens, keys)

    def channels_first(x: Float[Array, "... h w c"]) -> Float[np.ndarray, "... c h w"]:
        return np.moveaxis(np.asarray(x), -1, -3)

    adapters = run.tuning.adapters(params)
    np.savez(
        path,
        images=channels_first(images),
        noise=channels_first(clean.x[:, 0]),
        x=channels_first(batch.trajectory.x),
        t=np.asarray(batch.trajectory.t[:, :-1]),
        log_prob=np.asarray(batch.trajectory.log_prob),
        advantage=np.asarray(batch.advantage),
        **{f"adapter/{name}": tensor for name, tensor in convert.adapters_to_torch(adapters, prefix="").items()},
        **{f"gradient/{name}": tensor for name, tensor in torch_named(grads, lora=bool(adapters)).items()},
    )
    return {"prompts": prompts.texts, "ratio": deviation}


def moved(params: PyTree) -> PyTree:
    """Adapters with a B that is not 0, so that both factors have a gradient; all weights as they are."""
    rng = np.random.default_rng(0)

    def move(path, x):
        return x + rng.normal(0, 0.02, x.shape).astype(x.dtype) if path[-1].key == "B" else x

    return jax.tree_util.tree_map_with_path(move, params)


def gradient(ready: Ready, params: PyTree, batch: PyTree) -> tuple[PyTree, float]:
    """Of the mean loss over all rows, as the update computes it; and the largest |ratio - 1|."""
    run, update = ready.run, ready.update
    (micro_batches,) = plan(
        run.algorithm.slices(batch),
        np.random.default_rng(0),
        num_updates=1,
        fraction=1.0,
        micro_batch_size=run.schedule.micro_batch_size,
    )
    key = jax.random.key(0)
    total = update.zero(params, run.frozen, batch, micro_batches[0], key)
    for micro_batch in micro_batches:
        total, _ = update.accumulate(params, run.frozen, batch, micro_batch, key, total)
    return jax.tree.map(lambda g: g / total.weight, total.grads), float(total.max["ratio_max_deviation"])


def torch_named(grads: PyTree, *, lora: bool) -> dict[str, np.ndarray]:
    """A gradient under the names of what it is of."""
    if lora:  # alpha = rank, so that the factors are stored as they are
        factors = {path: (factor["A"], factor["B"]) for path, factor in grads.items()}
        return convert.adapters_to_torch(factors, prefix="")
    return convert.to_torch(grads)


def make_jobs() -> dict[str, Callable]:
    """What this party does when it is asked; `prepare` comes before `round`."""
    ready: Ready

    def prepare(prompts: Sequence[str], **cell: Any) -> None:
        nonlocal ready
        config = make_config(**cell)
        config.prompts.list = tuple(prompts)
        ready = begin(config)

    def one_more() -> Phases:
        nonlocal ready
        ready, phases = one_round(ready)
        return phases

    def reference(path: str, prompts: Sequence[str], **cell: Any) -> dict[str, Any]:
        config = make_config(**cell)
        config.prompts.list = tuple(prompts)
        return write_reference(path, config)

    return {"versions": environment, "prepare": prepare, "round": one_more, "reference": reference}


if __name__ == "__main__":
    runtime.set_up("~/.cache/ddpo_jax")  # as a training does
    serve(make_jobs())
