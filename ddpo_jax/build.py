"""From a config to the parts of a run. Beside main.py, the only file that reads the config by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddpo_jax import advantages, algorithms, data, finetune, optimizers, rewards
from ddpo_jax.algorithms.ddpo import Scoring
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.errors import UserError
from ddpo_jax.models import stable_diffusion
from ddpo_jax.policy import make_policy, make_sampler
from ddpo_jax.types import Algorithm, Finetune, Frozen, Model, Prompts, PyTree, TrainState
from ddpo_jax.update import Schedule
from ddpo_jax.workdir import flatten

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Run(NamedTuple):
    """Everything train.py joins."""

    algorithm: Algorithm
    parts: Parts
    tuning: Finetune
    tx: optax.GradientTransformation
    frozen: Frozen
    draw: Callable  # epoch -> the round's inputs, pure
    eval_prompts: dict[str, Prompts]  # by name: train, held_out
    reward_weights: np.ndarray
    folder: Path  # of the pretrained model
    notes: tuple[str, ...]


def build(config: ConfigDict, phase: Callable) -> Run:
    """Loads and checks all that a run needs, before anything is written or compiled.

    Raises:
        UserError, RunStopped: something of it cannot be used.
    """
    check_counts(config)
    dtype = choose(DTYPES, config.compute_dtype, "compute_dtype")
    model, pretrained = stable_diffusion.load(
        config.pretrained.model, dtype=dtype, resolution=config.pretrained.resolution or None
    )
    tokenizer = data.load_tokenizer(pretrained.folder / "tokenizer")
    policy = make_policy(
        model,
        num_steps=config.sample.num_steps,
        eta=config.sample.eta,
        guidance_scale=config.sample.guidance_scale,
        log_prob_reduction=config.sample.log_prob_reduction,
    )
    reward, reward_params = rewards.make(
        config.reward.name, deadline=config.reward.deadline, num_workers=config.reward.num_workers
    )
    reward_weights = np.asarray(config.reward.weights or (1.0,) * len(reward.names), np.float32)
    if len(reward_weights) != len(reward.names):
        raise UserError(
            f"reward.weights={tuple(config.reward.weights)}: expected {len(reward.names)} numbers, one for each of"
            f" {', '.join(reward.names)}"
        )
    prompt_sets, notes = load_prompts(config.prompts, tokenizer)
    uncond = model.encode_text(pretrained.text, jnp.asarray(data.tokenize(tokenizer, [""])))
    frozen = on_device(Frozen(pretrained.text, pretrained.denoiser, pretrained.vae, uncond, reward_params))
    parts = Parts(model, policy, make_sampler(model, policy), reward, phase, config.sample.chunk_size)

    train_set, train_tokens = prompt_sets["train"]
    resolution = jax.eval_shape(model.decode, pretrained.vae, jnp.zeros((1, *model.latent_shape))).shape[1]
    rewards.probe(reward, reward_params, data.every(train_set, train_tokens, count=2), resolution=resolution)
    settings_of = choose(METHODS, config.algorithm, "algorithm")
    draw, settings = settings_of(config, train_set, train_tokens, tokenizer, resolution)
    return Run(
        algorithm=algorithms.make(config.algorithm, parts, settings),
        parts=parts,
        tuning=make_finetune(config.train),
        tx=make_optimizer(config.train),
        frozen=frozen,
        draw=draw,
        eval_prompts={
            name: data.every(prompt_set, tokens, count=config.eval_prompts)
            for name, (prompt_set, tokens) in prompt_sets.items()
        },
        reward_weights=reward_weights,
        folder=pretrained.folder,
        notes=(*notes, *describe(config, model, run_length=config.num_epochs)),
    )


def init_state(run: Run, *, seed: int, ema: bool) -> TrainState:
    """The state of a run that has not begun."""
    key = jax.random.key(seed)
    params = on_device(jax.jit(run.tuning.init)(key, run.frozen.denoiser))
    return TrainState(
        epoch=np.array(0, np.int32),
        step=on_device(jnp.zeros((), jnp.int32)),
        params=params,
        ema=on_device(jax.tree.map(jnp.array, params)) if ema else None,
        opt_state=on_device(jax.jit(run.tx.init)(params)),
        carry=run.algorithm.init(),
        key=on_device(jax.random.key_data(key)),
    )


def on_device(tree: PyTree) -> PyTree:
    """The tree committed to the first device.

    Restored arrays are committed too; a program compiles anew, and may round anew, for arrays that are not.
    """
    return jax.device_put(tree, jax.devices()[0])


def describe(config: ConfigDict, model: Model, *, run_length: int) -> tuple[str, ...]:
    """What follows from the config's numbers, for people to check before they wait."""
    if config.algorithm == "sft":
        samples = config.data.batch_size
    else:
        samples = config.sample.num_prompts * config.sample.num_samples_per_prompt
    updates = config.train.num_updates * config.train.num_inner_epochs
    lines = [f"{run_length} epochs of {samples} samples and {updates} updates"]
    if config.algorithm == "ddpo_is" and config.sample.log_prob_reduction == "mean":
        size = int(np.prod(model.latent_shape))
        nats = config.train.clip_range * size
        lines.append(
            f"clip range {config.train.clip_range:g} a latent element: {nats:.3g} nats of a step's whole log-ratio"
            f" ({size} elements)"
        )
    return tuple(lines)


def load_prompts(config: ConfigDict, tokenizer) -> tuple[dict[str, tuple], tuple[str, ...]]:
    """The train and held-out sets with their tokens, and what the user should know of them."""
    source = data.prompt_source(config.name, tuple(config.list))
    train, held_out = data.split(source, fraction=config.held_out, seed=config.split_seed)
    sets = {"train": train, "held_out": held_out}
    sets = {name: (found, data.tokenize(tokenizer, found.texts)) for name, found in sets.items() if found.texts}
    too_long = data.find_too_long(tokenizer, source.texts)
    notes = ()
    if too_long:
        notes = (
            f"{len(too_long)} of {len(source.texts)} prompts are longer than {tokenizer.model_max_length} tokens and"
            f" are cut there, such as {too_long[0]!r}",
        )
    return sets, notes


def ddpo(config: ConfigDict, prompt_set, tokens, tokenizer, resolution) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings that DDPO-IS and DDPO-SF share."""

    def draw(epoch: int) -> Prompts:
        return data.draw(
            prompt_set,
            tokens,
            num_prompts=config.sample.num_prompts,
            num_samples_per_prompt=config.sample.num_samples_per_prompt,
            seed=config.seed,
            epoch=epoch,
        )

    if config.sample.eta == 0:
        raise UserError("sample.eta=0 leaves DDPO nothing to learn from: every step is deterministic; set 1")
    tracking = config.per_prompt_stat_tracking
    statistics = (
        advantages.per_prompt(
            num_prompts=len(prompt_set.texts), buffer_size=tracking.buffer_size, min_count=tracking.min_count
        )
        if tracking.buffer_size
        else advantages.whiten()
    )
    num_experts = len(config.reward.name.split(","))
    scoring = Scoring(
        statistics,
        tuple(config.reward.weights or (1.0,) * num_experts),
        adv_clip_max=config.train.adv_clip_max,
        max_missing=config.reward.max_missing,
    )
    settings = {
        "scoring": scoring,
        "num_updates": config.train.num_updates * config.train.num_inner_epochs,
        "kl_weight": config.train.kl_weight,
        "kl_budget": config.train.kl_budget,
    }
    return draw, settings


def ddpo_is(config: ConfigDict, prompt_set, tokens, tokenizer, resolution) -> tuple[Callable, dict[str, Any]]:
    draw, settings = ddpo(config, prompt_set, tokens, tokenizer, resolution)
    default = "stored" if config.compute_dtype == "float32" else "recompute"
    settings["clip_range"] = config.train.clip_range
    settings["old_log_prob"] = config.train.old_log_prob or default
    return draw, settings


def sft(config: ConfigDict, prompt_set, tokens, tokenizer, resolution) -> tuple[Callable, dict[str, Any]]:
    """The pictures and captions of a round, and the settings of supervised fine-tuning."""
    source = data.image_text(config.data.source, resolution=resolution)

    def draw(epoch: int) -> tuple[np.ndarray, Prompts]:
        images, captions = data.image_text_batch(
            source, batch_size=config.data.batch_size, seed=config.seed, epoch=epoch, resolution=resolution
        )
        ids = np.arange(len(captions), dtype=np.int32)
        return images, Prompts(captions, data.tokenize(tokenizer, captions), ids, ({},) * len(captions))

    return draw, {"prompt_dropout": config.data.prompt_dropout, "num_noise_draws": config.data.num_noise_draws}


METHODS = {"ddpo_is": ddpo_is, "ddpo_sf": ddpo, "sft": sft}


def make_finetune(train: ConfigDict) -> Finetune:
    """lora_rank 0 is full fine-tuning."""
    if train.lora_rank == 0:
        return finetune.full()
    return finetune.lora(
        rank=train.lora_rank, alpha=train.lora_alpha or float(train.lora_rank), targets=train.lora_targets
    )


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    return optimizers.adamw(
        learning_rate=train.learning_rate,
        b1=train.adam_beta1,
        b2=train.adam_beta2,
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
        max_grad_norm=train.max_grad_norm,
        num_warmup_steps=train.num_warmup_steps,
        num_decay_steps=train.num_decay_steps,
    )


def check_counts(config: ConfigDict) -> None:
    """Counts that no part of the run checks by itself."""
    counts = {
        "sample.num_prompts": config.sample.num_prompts,
        "sample.num_samples_per_prompt": config.sample.num_samples_per_prompt,
        "sample.chunk_size": config.sample.chunk_size,
        "train.num_updates": config.train.num_updates,
        "train.num_inner_epochs": config.train.num_inner_epochs,
        "train.micro_batch_size": config.train.micro_batch_size,
        "num_epochs": config.num_epochs,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
        "eval_prompts": config.eval_prompts,
    }
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: expected 0 or more")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value}: expected 1 or more")
    if not 0 < config.train.timestep_fraction <= 1:
        raise UserError(f"train.timestep_fraction={config.train.timestep_fraction}: expected more than 0, at most 1")
    if not 0 <= config.train.ema_decay < 1:
        raise UserError(f"train.ema_decay={config.train.ema_decay}: expected 0 (no average) or more, below 1")
    samples = config.sample.num_prompts * config.sample.num_samples_per_prompt
    if config.algorithm != "sft" and samples < config.train.num_updates:
        raise UserError(f"train.num_updates={config.train.num_updates}: expected at most the {samples} samples a round")


def choose(table: dict[str, Any], name: str, field: str) -> Any:
    if name not in table:
        raise UserError(f"{field}={name!r} is unknown: expected one of {', '.join(table)}")
    return table[name]


def schedule(config: ConfigDict) -> Schedule:
    """How a round is learned from."""
    return Schedule(
        num_updates=config.train.num_updates,
        num_inner_epochs=config.train.num_inner_epochs,
        timestep_fraction=config.train.timestep_fraction,
        micro_batch_size=config.train.micro_batch_size,
    )


def about(config: ConfigDict, run: Run, *, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """What an exported folder's model card tells."""
    return {
        "name": name,
        "model": config.pretrained.model,
        "algorithm": config.algorithm,
        "prompt": run.eval_prompts["train"].texts[0],
        "num_steps": config.sample.num_steps,
        "guidance_scale": config.sample.guidance_scale,
        "eta": config.sample.eta,
        "figures": figures,
        "config": flatten(config.to_dict()),
    }
