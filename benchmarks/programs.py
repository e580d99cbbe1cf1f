"""The programs of a run and the shapes that go into them, from a config and a model's JSON alone, without weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from benchmarks.families import FAMILIES, SCHEDULER, read_configs
from ddpo_jax import algorithms, data, process, settings
from ddpo_jax.algorithms.ddpo import Rollouts
from ddpo_jax.algorithms.diffusion_dpo import Pairs, make_pairs
from ddpo_jax.algorithms.encode import make_encoder
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.build import DTYPES
from ddpo_jax.errors import UserError
from ddpo_jax.methods import Loaded, method_of, objective_of
from ddpo_jax.models import pipeline
from ddpo_jax.models.kernels import choose_kernels
from ddpo_jax.models.locate import TINY
from ddpo_jax.models.stable_diffusion import make_model, stored
from ddpo_jax.policy import make_policy, make_sampler
from ddpo_jax.process import choose
from ddpo_jax.sharding import BATCH, Layout
from ddpo_jax.types import Frozen, PyTree, TrainState, Trajectory
from ddpo_jax.update import MicroBatch, make_update


class Program(NamedTuple):
    fn: Callable  # jitted
    inputs: tuple  # shapes, in their places


class AbstractRun(NamedTuple):
    """Shapes, in their places on the devices of a layout, and the programs that read them."""

    frozen: Frozen  # without a reward's parameters
    state: TrainState
    grads: PyTree
    batch: Rollouts | Pairs  # of a round
    sample: Program  # a chunk
    accumulate: Program  # a micro-batch
    apply: Program  # an optimizer step
    recomputes: bool  # whether each row goes through `accumulate` once more, for its old log-prob


class Planned(NamedTuple):
    """What a method's programs depend on beside the model."""

    settings: Callable  # config, Loaded -> the settings of its Algorithm
    batch: Callable  # config, cond of a sample, latent shape, samples -> the arrays of a round


def check_samples(config: ConfigDict) -> None:
    """Raises UserError if the config's algorithm does not learn from trajectories."""
    if config.algorithm not in ("ddpo_is", "ddpo_sf"):
        raise UserError(f"algorithm={config.algorithm!r}: expected 'ddpo_is' or 'ddpo_sf'")


def read_model(config: ConfigDict, family: str = "") -> tuple[pipeline.Configs, process.NoiseSchedule]:
    """What the JSON files say of a published family, or of the config's own model, which must then be a folder here.

    Raises:
        UserError: there is no such family, or no such folder.
    """
    if family:
        prediction_type = choose(FAMILIES, family, "--model").prediction_type
        return read_configs(family), process.noise_schedule(SCHEDULER | {"prediction_type": prediction_type})
    folder = TINY if config.pretrained.model == "tiny" else Path(config.pretrained.model).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"pretrained.model={config.pretrained.model!r}: no such folder;"
            f" --model={', '.join(FAMILIES)} plans for that family without its files"
        )
    configs = pipeline.read_configs(folder)
    return configs, pipeline.read_schedule(folder, configs.pipeline)


def abstract_run(
    config: ConfigDict,
    configs: pipeline.Configs,
    schedule: process.NoiseSchedule,
    *,
    layout: Layout,
    chunk_size: int,
    micro_batch_size: int,
) -> AbstractRun:
    """The programs of a run as ddpo_jax.build would make them.

    chunk_size: pictures a shard of the batch that `sample` draws.  micro_batch_size: rows a shard of `accumulate`.

    Raises:
        UserError: the config cannot be used, or its algorithm is none of PLANNED.
    """
    settings.check(config)
    planned = choose(PLANNED, config.algorithm, "algorithm")
    sample, dtype = config.sample, choose(DTYPES, config.compute_dtype, "compute_dtype")
    model = make_model(
        configs,
        process.ddim(schedule),
        dtype=dtype,
        resolution=config.pretrained.resolution or None,
        remat=config.train.remat,
        # "auto" is the best of this machine, and the programs are for others
        kernels=choose_kernels(
            {"auto": "xla"}.get(config.attention, config.attention),
            {"auto": "direct"}.get(config.convolution, config.convolution),
            dtype=dtype,
        ),
    )
    policy = make_policy(
        model,
        num_steps=sample.num_steps,
        eta=sample.eta,
        guidance_scale=sample.guidance_scale,
        log_prob_reduction=sample.log_prob_reduction,
    )
    tuning, tx = settings.make_finetune(config.train), settings.make_optimizer(config.train)
    sampler = make_sampler(
        model, policy, tuning.merge, layout=layout, decode_chunk_size=config.sample.decode_chunk_size
    )
    chunk, rows = chunk_size * layout.num_shards, micro_batch_size * layout.num_shards
    parts = Parts(model, policy, sampler, None, None, layout, chunk_size, tuning.merge)
    prompts = data.prompt_source(config.prompts.name, tuple(config.prompts.list))
    timesteps = np.asarray(model.process.timesteps(sample.num_steps))
    loaded = Loaded(prompts, None, (), 0, None, timesteps, np.ones(1, np.float32), model.latent_shape, dict)
    algorithm = algorithms.make(config.algorithm, parts, planned.settings(config, loaded))
    update = make_update(algorithm, tuning, tx, ema_decay=config.train.ema_decay, layout=layout)

    shapes = stored(configs, dtype, exact=tuning.changes)
    params = place(jax.eval_shape(tuning.init, jax.random.key(0), shapes["unet"]), layout)
    text = place({part: shapes[part] for part in configs.text}, layout)
    tokens = jax.ShapeDtypeStruct((chunk, sum(text.max_length for text in configs.text.values())), np.int32)
    uncond = jax.eval_shape(model.encode_text, text, jax.ShapeDtypeStruct((1, *tokens.shape[1:]), np.int32))
    kept = tuning.reads_pretrained or algorithm.reads_reference
    frozen = Frozen(text, place(shapes["unet"], layout) if kept else None, place(shapes["vae"], layout), uncond, ())
    ema = params if config.train.ema_decay else None
    opt_state = place(jax.eval_shape(tx.init, params), layout)
    state = TrainState(None, jax.ShapeDtypeStruct((), np.int32), params, ema, opt_state, None, None)

    num_samples = -(-method_of(config).drawn(config) // chunk) * chunk  # filled up
    batch = jax.eval_shape(lambda: planned.batch(config, uncond, model.latent_shape, num_samples))
    cut = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec(BATCH))
    on_devices = {"cond", "trajectory", "x_0"} & set(batch._fields)
    batch = batch._replace(**{name: put(getattr(batch, name), cut) for name in on_devices})
    micro_batch = MicroBatch(jax.ShapeDtypeStruct((rows, 2), np.int32), jax.ShapeDtypeStruct((rows,), np.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), chunk))
    inputs = (params, frozen, batch, micro_batch, key)
    total = jax.eval_shape(update.zero, *inputs)
    total = total._replace(grads=place(total.grads, layout))
    return AbstractRun(
        frozen=frozen,
        state=state,
        grads=total.grads,
        batch=batch,
        sample=Program(sampler, (params, frozen, tokens, keys)),
        accumulate=Program(update.accumulate, (*inputs, total)),
        apply=Program(update.apply, (state, total)),
        recomputes=algorithm.recompute is not None,
    )


def rollouts(config: ConfigDict, cond: Any, latent_shape: tuple[int, ...], count: int) -> Rollouts:
    """A round's samples, as the update reads them."""
    num_steps = config.sample.num_steps
    trajectory = Trajectory(
        t=jnp.zeros((count, num_steps + 1)),
        x=jnp.zeros((count, num_steps + 1, *latent_shape)),
        log_prob=jnp.zeros((count, num_steps)),
        trained=jnp.ones((count, num_steps), bool),
    )
    return Rollouts(repeated(cond, count), trajectory, jnp.zeros(count), jnp.ones(count))


def pairs(config: ConfigDict, cond: Any, latent_shape: tuple[int, ...], count: int) -> Pairs:
    """A round's encoded pairs, as the update reads them."""
    x_0, ones = jnp.zeros((count, 2, *latent_shape)), np.ones(count, np.float32)
    return make_pairs(repeated(cond, count), x_0, ones, ones, objective_of(config))


def repeated(cond: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), cond)


def preference_settings(config: ConfigDict, loaded: Loaded) -> dict[str, Any]:
    """As methods.diffusion_dpo gives them, without a data set."""
    return {
        "objective": objective_of(config),
        "make_encoder": make_encoder,
        "prompt_dropout": config.data.prompt_dropout,
    }


def sampled_settings(config: ConfigDict, loaded: Loaded) -> dict[str, Any]:
    return method_of(config).make(config, loaded)[1]


PLANNED = {
    "ddpo_is": Planned(sampled_settings, rollouts),
    "ddpo_sf": Planned(sampled_settings, rollouts),
    "diffusion_dpo": Planned(preference_settings, pairs),
}


def place(tree: PyTree, layout: Layout) -> PyTree:
    """The shapes, cut by the layout's table."""
    return jax.tree.map(put, tree, layout.parameters(tree))


def put(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def size(tree: PyTree) -> int:
    """Bytes of the tree on a device: those of the part that is its own."""

    def own(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(own(leaf) for leaf in jax.tree.leaves(tree))
