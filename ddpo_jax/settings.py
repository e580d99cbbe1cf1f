"""From the config's fields to the named settings of the parts that read them."""

from __future__ import annotations

import math

import optax
from ml_collections import ConfigDict

from ddpo_jax import finetune, optimizers, rewards
from ddpo_jax.config import from_data
from ddpo_jax.errors import UserError
from ddpo_jax.methods import method_of
from ddpo_jax.types import Finetune
from ddpo_jax.update import Schedule
from ddpo_jax.workdir import flatten


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
        "train.num_noise_draws": train.num_noise_draws,
        "dpo.num_pairs": config.dpo.num_pairs,
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
        "sample.window": sample.window,
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
    check_read(config)
    learned = method_of(config).learned(config)
    if learned < train.num_updates:
        raise UserError(f"train.num_updates={train.num_updates}: expected at most the {learned} samples a round")


def check_read(config: ConfigDict) -> None:
    """Fields that would be passed over in silence, where somebody may rely on them."""
    name, train = config.algorithm, config.train
    for field in ("kl_weight", "kl_budget"):
        if train[field] and not name.startswith("ddpo"):
            raise UserError(f"train.{field}={train[field]}: only the ddpo algorithms know it, not {name}; set 0")
    if config.reward.shuffled and from_data(name):
        raise UserError(f"reward.shuffled: {name} learns from no reward; shuffle the labels of its data instead")
    if config.sample.window and not name.startswith("ddpo"):
        raise UserError(f"sample.window={config.sample.window}: only the ddpo algorithms know it, not {name}; set 0")
    if config.data.cache and not from_data(name):
        raise UserError(f"data.cache={config.data.cache!r}: {name} learns from no data set; set ''")
    if config.data.cache_dtype != "float32" and not config.data.cache:
        raise UserError(
            f"data.cache_dtype={config.data.cache_dtype!r}: nothing is kept without data.cache; set 'float32'"
        )
    if config.sample.shared_noise and name == "reward_backprop":
        raise UserError("sample.shared_noise: reward_backprop compares no pictures; set False")


def chunk_size(config: ConfigDict, *, num_shards: int) -> int:
    """Pictures a program call and shard."""
    return evenly(method_of(config).drawn(config), at_most=config.sample.chunk_size, num_shards=num_shards)


def schedule(config: ConfigDict, *, num_shards: int) -> Schedule:
    """How a round is learned from."""
    method = method_of(config)
    taken = max(1, round(method.slices(config) * config.train.timestep_fraction))
    rows = -(-method.learned(config) // config.train.num_updates) * taken
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
