"""From the config's fields to the named settings of the parts that read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from ddpo_jax import advantages, data, finetune, image_text, optimizers, rewards
from ddpo_jax.algorithms.ddpo import Scoring
from ddpo_jax.errors import UserError
from ddpo_jax.experts import Combination
from ddpo_jax.models.tokenizer import find_too_long, tokenize_all
from ddpo_jax.types import Finetune, Prompts
from ddpo_jax.update import Schedule
from ddpo_jax.workdir import flatten


class Loaded(NamedTuple):
    """What a method's settings may depend on beside the config."""

    prompts: data.PromptSet  # to train on
    tokens: Int[np.ndarray, "n s"]
    tokenizers: tuple[CLIPTokenizer, ...]
    resolution: int  # pixels
    experts: Combination
    timesteps: Float[np.ndarray, " T+1"]  # of the sampler


def ddpo(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings that DDPO-IS and DDPO-SF share."""

    def draw(epoch: int) -> Prompts:
        return data.draw(
            loaded.prompts,
            loaded.tokens,
            num_prompts=config.sample.num_prompts,
            num_samples_per_prompt=config.sample.num_samples_per_prompt,
            seed=config.seed,
            epoch=epoch,
        )

    if config.sample.eta == 0:
        raise UserError("sample.eta=0 leaves DDPO nothing to learn from: every step is deterministic; set 1")
    first = loaded.timesteps[0]
    if config.train.min_timestep > first:
        raise UserError(
            f"train.min_timestep={config.train.min_timestep}: expected at most {first:g}, where the first of"
            f" {config.sample.num_steps} steps begins"
        )
    scoring = Scoring(
        loaded.experts,
        make_advantages(config, num_prompts=len(loaded.prompts.texts)),
        adv_clip_max=config.train.adv_clip_max,
        max_missing=config.reward.max_missing,
        group_size=config.sample.num_samples_per_prompt if config.sample.shared_noise else 1,
    )
    settings = {
        "scoring": scoring,
        "num_updates": config.train.num_updates * config.train.num_inner_epochs,
        "kl_weight": config.train.kl_weight,
        "kl_budget": config.train.kl_budget,
        "min_timestep": config.train.min_timestep,
    }
    return draw, settings


def make_advantages(config: ConfigDict, *, num_prompts: int) -> advantages.Advantages:
    tracking = config.per_prompt_stat_tracking
    if config.sample.shared_noise:
        if tracking.buffer_size:
            raise UserError(
                "sample.shared_noise compares the pictures of a draw with each other alone:"
                f" per_prompt_stat_tracking.buffer_size={tracking.buffer_size} must be 0"
            )
        return advantages.per_group(size=config.sample.num_samples_per_prompt)
    if tracking.buffer_size:
        return advantages.per_prompt(
            num_prompts=num_prompts, buffer_size=tracking.buffer_size, min_count=tracking.min_count
        )
    return advantages.whiten()


def ddpo_is(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    draw, settings = ddpo(config, loaded)
    default = "stored" if config.compute_dtype == "float32" else "recompute"
    settings["clip_range"] = config.train.clip_range
    settings["old_log_prob"] = config.train.old_log_prob or default
    return draw, settings


def sft(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The pictures and captions of a round, and the settings of supervised fine-tuning."""
    source = image_text.open_source(config.data.source, resolution=loaded.resolution)

    def draw(epoch: int) -> tuple[np.ndarray, Prompts]:
        images, captions = image_text.make_batch(
            source, batch_size=config.data.batch_size, seed=config.seed, epoch=epoch, resolution=loaded.resolution
        )
        ids = np.arange(len(captions), dtype=np.int32)
        cut = set(find_too_long(loaded.tokenizers[0], captions))
        metadata = tuple({"cut": caption in cut} for caption in captions)
        return images, Prompts(captions, tokenize_all(loaded.tokenizers, captions), ids, metadata)

    return draw, {"prompt_dropout": config.data.prompt_dropout, "num_noise_draws": config.data.num_noise_draws}


METHODS = {"ddpo_is": ddpo_is, "ddpo_sf": ddpo, "sft": sft}


def reward_settings(config: ConfigDict) -> rewards.Settings:
    """What the rewards are made with. If no CLIP is named, the embedded one judges the embedded model's pictures."""
    found = rewards.Settings(**{name: config.reward[name] for name in rewards.Settings._fields})
    return found._replace(clip_model=found.clip_model or {"tiny": "tiny"}.get(config.pretrained.model, ""))


def make_finetune(train: ConfigDict) -> Finetune:
    """lora_rank 0 is full fine-tuning."""
    if train.lora_rank == 0:
        return finetune.full()
    return finetune.lora(
        rank=train.lora_rank, alpha=train.lora_alpha or float(train.lora_rank), targets=train.lora_targets
    )


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    return optimizers.make(
        train.optimizer,
        moment_dtype=train.adam_moment_dtype,
        learning_rate=train.learning_rate,
        b1=train.adam_beta1,
        b2=train.adam_beta2,
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
        max_grad_norm=train.max_grad_norm,
        num_warmup_steps=train.num_warmup_steps,
        num_decay_steps=train.num_decay_steps,
    )


def check(config: ConfigDict) -> None:
    """Numbers that no part of the run checks by itself."""
    for name, value in flatten(config.to_dict()).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value}: expected a finite number")
    sample, train = config.sample, config.train
    at_least_one = {
        "sample.num_prompts": sample.num_prompts,
        "sample.num_samples_per_prompt": sample.num_samples_per_prompt,
        "sample.chunk_size": sample.chunk_size,
        "train.num_updates": train.num_updates,
        "train.num_inner_epochs": train.num_inner_epochs,
        "train.micro_batch_size": train.micro_batch_size,
        "data.batch_size": config.data.batch_size,
        "num_epochs": config.num_epochs,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
        "eval_prompts": config.eval_prompts,
    }
    not_negative = {
        "seed": config.seed,
        "eval_every": config.eval_every,
        "keep_best_checkpoints": config.keep_best_checkpoints,
        "sample.decode_chunk_size": sample.decode_chunk_size,
        "train.min_timestep": train.min_timestep,
        "train.kl_weight": train.kl_weight,
        "train.kl_budget": train.kl_budget,
        "train.lora_rank": train.lora_rank,
        "train.lora_alpha": train.lora_alpha,
        "train.adam_epsilon": train.adam_epsilon,
        "train.adam_weight_decay": train.adam_weight_decay,
        "per_prompt_stat_tracking.buffer_size": config.per_prompt_stat_tracking.buffer_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{name}={value}: expected 1 or more")
    for name, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{name}={value}: expected 0 or more")
    if not train.adv_clip_max > 0:
        raise UserError(f"train.adv_clip_max={train.adv_clip_max}: expected a positive number; 5 is usual")
    if not 0 <= config.reward.max_missing <= 1:
        raise UserError(f"reward.max_missing={config.reward.max_missing}: expected a fraction from 0 to 1")
    if not 0 < train.timestep_fraction <= 1:
        raise UserError(f"train.timestep_fraction={train.timestep_fraction}: expected more than 0, at most 1")
    if not 0 <= train.ema_decay < 1:
        raise UserError(f"train.ema_decay={train.ema_decay}: expected 0 (no average) or more, below 1")
    samples = sample.num_prompts * sample.num_samples_per_prompt
    if config.algorithm != "sft" and samples < train.num_updates:
        raise UserError(f"train.num_updates={train.num_updates}: expected at most the {samples} samples a round")


def num_samples(config: ConfigDict) -> int:
    """Samples a round."""
    if config.algorithm == "sft":
        return config.data.batch_size
    return config.sample.num_prompts * config.sample.num_samples_per_prompt


def chunk_size(config: ConfigDict, *, num_shards: int) -> int:
    """Pictures a program call and shard."""
    return evenly(num_samples(config), at_most=config.sample.chunk_size, num_shards=num_shards)


def schedule(config: ConfigDict, *, num_shards: int) -> Schedule:
    """How a round is learned from."""
    slices = config.data.num_noise_draws if config.algorithm == "sft" else config.sample.num_steps
    taken = max(1, round(slices * config.train.timestep_fraction))
    rows = -(-num_samples(config) // config.train.num_updates) * taken
    micro_batch_size = evenly(rows, at_most=config.train.micro_batch_size, num_shards=num_shards)
    return Schedule(
        num_updates=config.train.num_updates,
        num_inner_epochs=config.train.num_inner_epochs,
        timestep_fraction=config.train.timestep_fraction,
        micro_batch_size=micro_batch_size * num_shards,
    )


def evenly(count: int, *, at_most: int, num_shards: int) -> int:
    """How many of `count` things a shard takes at a time: in as few times as it can, with little to fill up."""
    own = -(-count // num_shards)
    return -(-own // -(-own // at_most))
