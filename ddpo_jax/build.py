"""From a config to the parts of a run, all checked before anything is written or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float32
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from ddpo_jax import algorithms, data, experts, multihost, rewards, settings
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.config import from_data
from ddpo_jax.errors import UserError
from ddpo_jax.experts import Combination
from ddpo_jax.methods import Loaded, method_of
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.stable_diffusion import Pretrained, Source, freeze
from ddpo_jax.models.tokenizer import find_too_long, tokenize_all
from ddpo_jax.policy import make_policy, make_sampler
from ddpo_jax.process import choose
from ddpo_jax.sharding import Layout, first_device, make_layout
from ddpo_jax.types import Algorithm, Finetune, Frozen, Model, Prompts, PyTree, TrainState
from ddpo_jax.update import Schedule
from ddpo_jax.window import ANEW

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Run(NamedTuple):
    """Everything train.py joins."""

    layout: Layout
    algorithm: Algorithm
    parts: Parts
    schedule: Schedule
    tuning: Finetune
    tx: optax.GradientTransformation
    frozen: Frozen
    draw: Callable  # epoch, watch -> the round's inputs, pure; watch is called at each picture and may raise
    eval_prompts: dict[str, Prompts]  # by name: train, held_out
    experts: Combination  # of the rewards
    source: Source  # of the pretrained model
    drawn: int  # pictures that a round draws or encodes
    notes: tuple[str, ...]


def build(config: ConfigDict, phase: Callable) -> Run:
    """Loads and checks all that a run needs, before anything is written or compiled.

    Raises:
        UserError, RunStopped: something of it cannot be used.
    """
    settings.check(config)
    layout = make_layout(**config.mesh)
    method = method_of(config)
    weights = weigh(rewards.names_of(config.reward.name), tuple(config.reward.weights))
    reward, reward_params = rewards.make(
        config.reward.name, settings.reward_settings(config), weights=weights.tolist(), place=layout.parameters
    )
    combination = experts.make(
        reward.names,
        weights,
        reduction=config.reward.combine,
        standardise=config.reward.standardise,
        gates=tuple(config.reward.gates),
    )
    tuning, tx = settings.make_finetune(config.train), settings.make_optimizer(config.train)
    source = data.prompt_source(config.prompts.name, tuple(config.prompts.list))

    model, pretrained = load_model(config, tuning, place=layout.parameters)
    jax.eval_shape(tuning.init, jax.random.key(0), pretrained.denoiser)  # raises what init would
    policy = make_policy(
        model,
        num_steps=config.sample.num_steps,
        eta=config.sample.eta,
        guidance_scale=config.sample.guidance_scale,
        log_prob_reduction=config.sample.log_prob_reduction,
    )
    prompt_sets, notes = load_prompts(config.prompts, source, pretrained.tokenizers)
    frozen = freeze(model, pretrained, reward=reward_params)
    frozen = frozen._replace(uncond=jax.jit(layout.whole)(frozen.uncond))
    sampler = make_sampler(
        model, policy, tuning.merge, layout=layout, decode_chunk_size=config.sample.decode_chunk_size
    )
    schedule = settings.schedule(config, num_shards=layout.num_shards)
    chunk_size = settings.chunk_size(config, num_shards=layout.num_shards)
    parts = Parts(model, policy, sampler, reward, phase, layout, chunk_size, tuning.merge)

    train_set, train_tokens = prompt_sets["train"]
    resolution = jax.eval_shape(model.decode, pretrained.vae, jnp.zeros((1, *model.latent_shape))).shape[1]
    grey = data.every(train_set, train_tokens, count=2)
    multihost.together(
        lambda: rewards.probe(
            reward,
            reward_params,
            grey,
            resolution=resolution,
            combine=lambda scores: combination.update(combination.init(), scores)[0],
        )
    )
    timesteps = np.asarray(model.process.timesteps(config.sample.num_steps))
    loaded = Loaded(
        prompts=train_set,
        tokens=train_tokens,
        tokenizers=pretrained.tokenizers,
        resolution=resolution,
        experts=combination,
        timesteps=timesteps,
        weights=weights,
        latent_shape=model.latent_shape,
        identify_encoder=partial(stable_diffusion.identify_encoder, pretrained.source, DTYPES[config.compute_dtype]),
    )
    draw, method_settings = method.make(config, loaded)
    return Run(
        layout=layout,
        schedule=schedule,
        algorithm=algorithms.make(config.algorithm, parts._replace(shuffled=config.reward.shuffled), method_settings),
        parts=parts,
        tuning=tuning,
        tx=tx,
        frozen=frozen,
        draw=draw,
        eval_prompts={
            name: data.every(prompt_set, tokens, count=config.eval_prompts)
            for name, (prompt_set, tokens) in prompt_sets.items()
        },
        experts=combination,
        source=pretrained.source,
        drawn=method.drawn(config),
        notes=(*notes, *describe(config, model, layout, schedule, chunk_size)),
    )


def load_model(config: ConfigDict, tuning: Finetune, *, place: Callable = first_device) -> tuple[Model, Pretrained]:
    """The config's pretrained model, stored as this tuning wants it."""
    return stable_diffusion.load(
        config.pretrained.model,
        dtype=choose(DTYPES, config.compute_dtype, "compute_dtype"),
        resolution=config.pretrained.resolution or None,
        remat=config.train.remat,
        attention=config.attention,
        convolution=config.convolution,
        variant=config.pretrained.variant,
        revision=config.pretrained.revision,
        exact=tuning.changes,
        place=place,
    )


def weigh(names: Sequence[str], weights: tuple) -> Float32[np.ndarray, " experts"]:
    """`reward.weights`, or 1 for each expert.

    Raises:
        UserError: they are not one finite number an expert, or all 0.
    """
    weights = weights or (1.0,) * len(names)
    numbers = all(isinstance(weight, Real) and np.isfinite(weight) for weight in weights)
    if not numbers or len(weights) != len(names) or not any(weights):
        raise UserError(
            f"reward.weights={weights}: expected {len(names)} numbers, not all 0, one for each of {', '.join(names)}"
        )
    return np.array(weights, np.float32)


def init_state(run: Run, *, seed: int, ema: bool) -> TrainState:
    """The state of a run that has not begun."""
    key_params, key = jax.random.split(jax.random.key(seed))

    def born(init: Callable, *inputs: PyTree) -> PyTree:
        """What `init` makes, in its place from the beginning."""
        return jax.jit(init, out_shardings=run.layout.parameters(jax.eval_shape(init, *inputs)))(*inputs)

    params = born(run.tuning.init, key_params, run.frozen.denoiser)
    return TrainState(
        epoch=np.array(0, np.int32),
        step=run.layout.replicate(np.zeros((), np.int32)),
        params=params,
        ema=born(lambda params: jax.tree.map(jnp.array, params), params) if ema else None,
        opt_state=born(run.tx.init, params),
        carry=run.algorithm.init(params),
        key=run.layout.replicate(np.asarray(jax.random.key_data(key))),
    )


def describe(config: ConfigDict, model: Model, layout: Layout, schedule: Schedule, chunk_size: int) -> tuple[str, ...]:
    """What follows from the config's numbers, for people to check before they wait."""
    samples, updates = method_of(config).learned(config), schedule.num_updates * schedule.num_inner_epochs
    lines = [
        f"{config.num_epochs} epochs of {samples} samples and {updates} updates",
        f"{layout.told}: {chunk_size * layout.num_shards} samples and {schedule.micro_batch_size} (sample, slice)"
        f" rows a program, {chunk_size} and {schedule.micro_batch_size // layout.num_shards} a shard of the batch",
    ]
    if not from_data(config.algorithm) and config.sample.shared_noise:
        lines.append(
            f"{config.sample.num_prompts} draws an epoch; the {config.sample.num_samples_per_prompt} pictures of a draw"
            " start from the same noise"
        )
    if config.sample.window:
        first = config.sample.window_start
        begins = "drawn anew in each epoch" if first == ANEW else f"step {first}"
        lines.append(
            f"{config.sample.window} of {config.sample.num_steps} denoising steps are noisy and learned from; the first"
            f" is {begins}"
        )
    if config.algorithm == "ddpo_is" and config.sample.log_prob_reduction == "mean":
        size = int(np.prod(model.latent_shape))
        nats = config.train.clip_range * size
        lines.append(
            f"clip range {config.train.clip_range:g} a latent element: {nats:.3g} nats of a step's whole log-ratio"
            f" ({size} elements)"
        )
    return tuple(lines)


def load_prompts(
    config: ConfigDict, source: data.PromptSet, tokenizers: Sequence[CLIPTokenizer]
) -> tuple[dict[str, tuple], tuple[str, ...]]:
    """The train and held-out sets with their tokens, and what the user should know of them."""
    train, held_out = data.split(source, fraction=config.held_out, seed=config.split_seed)
    sets = {"train": train, "held_out": held_out}
    sets = {name: (found, tokenize_all(tokenizers, found.texts)) for name, found in sets.items() if found.texts}
    too_long = find_too_long(tokenizers[0], source.texts)
    notes = ()
    if too_long:
        notes = (
            f"{len(too_long)} of {len(source.texts)} prompts are longer than {tokenizers[0].model_max_length} tokens"
            f" and are cut there, such as {too_long[0]!r}",
        )
    return sets, notes
