"""What each training method takes of the config: a round's inputs, its named settings, and how much it learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from ddpo_jax import advantages, data, image_text, preferences, window
from ddpo_jax.algorithms.ddpo import Scoring
from ddpo_jax.algorithms.diffusion_dpo import Objective
from ddpo_jax.algorithms.encode import make_encoder, make_recalling_encoder
from ddpo_jax.algorithms.judged import Judging
from ddpo_jax.errors import UserError
from ddpo_jax.experts import Combination
from ddpo_jax.latent_cache import Cache, open_cache
from ddpo_jax.models.tokenizer import find_too_long, tokenize_all
from ddpo_jax.pictures import nothing
from ddpo_jax.process import choose
from ddpo_jax.types import Prompts, Recalled


class Loaded(NamedTuple):
    """What a method's settings may depend on beside the config."""

    prompts: data.PromptSet  # to train on
    tokens: Int[np.ndarray, "n s"]
    tokenizers: tuple[CLIPTokenizer, ...]
    resolution: int  # pixels
    experts: Combination
    timesteps: Float[np.ndarray, " T+1"]  # of the sampler
    weights: Float[np.ndarray, " experts"]
    latent_shape: tuple[int, int, int]
    identify_encoder: Callable  # () -> what tells the VAE's encoder from another, JSON values by name


class Method(NamedTuple):
    """One training method."""

    make: Callable  # config, Loaded -> (epoch, watch -> the inputs of its round, the settings of its Algorithm)
    drawn: Callable  # config -> pictures that a round draws or encodes
    learned: Callable  # config -> samples that a round learns from
    slices: Callable  # config -> slices of each


def prompts_of(config: ConfigDict, loaded: Loaded) -> Callable:
    """The prompts of a round, for methods that learn from the model's own samples."""

    def draw(epoch: int, watch: Callable = nothing) -> Prompts:
        return data.draw(
            loaded.prompts,
            loaded.tokens,
            num_prompts=config.sample.num_prompts,
            num_samples_per_prompt=config.sample.num_samples_per_prompt,
            seed=config.seed,
            epoch=epoch,
        )

    return draw


def judging_of(config: ConfigDict, loaded: Loaded) -> Judging:
    group_size = config.sample.num_samples_per_prompt if config.sample.shared_noise else 1
    return Judging(loaded.experts, config.reward.max_missing, group_size)


def ddpo(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings that DDPO-IS and DDPO-SF share."""
    if config.sample.eta == 0:
        raise UserError("sample.eta=0 leaves DDPO nothing to learn from: every step is deterministic; set 1")
    first = loaded.timesteps[0]
    if config.train.min_timestep > first:
        raise UserError(
            f"train.min_timestep={config.train.min_timestep}: expected at most {first:g}, where the first of"
            f" {config.sample.num_steps} steps begins"
        )
    scoring = Scoring(
        judging_of(config, loaded),
        make_advantages(config, num_prompts=len(loaded.prompts.texts)),
        adv_clip_max=config.train.adv_clip_max,
    )
    settings = {
        "scoring": scoring,
        "num_updates": config.train.num_updates * config.train.num_inner_epochs,
        "kl_weight": config.train.kl_weight,
        "kl_budget": config.train.kl_budget,
        "min_timestep": config.train.min_timestep,
        "window": window.make(
            loaded.timesteps,
            size=config.sample.window,
            start=config.sample.window_start,
            min_timestep=config.train.min_timestep,
        ),
    }
    return prompts_of(config, loaded), settings


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


def rwr(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings of dense reward-weighted regression."""
    weights = advantages.softmax(temperature=config.rwr.temperature, by_prompt=config.rwr.by_prompt)
    return _rwr(config, loaded, weights)


def sparse_rwr(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings of sparse reward-weighted regression."""
    weights = advantages.top_fraction(fraction=config.rwr.top_fraction, by_prompt=config.rwr.by_prompt)
    return _rwr(config, loaded, weights)


def _rwr(config: ConfigDict, loaded: Loaded, weights: advantages.Advantages) -> tuple[Callable, dict[str, Any]]:
    settings = {
        "judging": judging_of(config, loaded),
        "weights": weights,
        "num_noise_draws": config.train.num_noise_draws,
        "guided": config.rwr.guided,
    }
    return prompts_of(config, loaded), settings


def sft(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The pictures and captions of a round, and the settings of supervised fine-tuning."""
    source = image_text.open_source(config.data.source, resolution=loaded.resolution)
    settings = {"prompt_dropout": config.data.prompt_dropout, "num_noise_draws": config.train.num_noise_draws}
    how = {"batch_size": config.data.batch_size, "seed": config.seed, "resolution": loaded.resolution}

    def draw(epoch: int, watch: Callable = nothing) -> tuple[np.ndarray, Prompts]:
        images, captions = image_text.make_batch(source, epoch=epoch, watch=watch, **how)
        return images[:, None], _captions(captions, loaded)

    if not config.data.cache:
        return draw, {"make_encoder": make_encoder, **settings}
    cache = _open_cache(config, loaded, source)

    def recall(epoch: int, watch: Callable = nothing) -> tuple[Recalled, Prompts]:
        pictures, captions = image_text.recall_batch(source, cache, epoch=epoch, watch=watch, **how)
        return pictures, _captions(captions, loaded)

    return recall, {"make_encoder": make_recalling_encoder, **settings}


def diffusion_dpo(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The pairs of a round, and the settings of Diffusion-DPO on a data set."""
    source = preferences.open_source(config.data.source, resolution=loaded.resolution)
    settings = {"objective": objective_of(config), "prompt_dropout": config.data.prompt_dropout}
    how = {
        "batch_size": config.data.batch_size,
        "seed": config.seed,
        "resolution": loaded.resolution,
        "horizontal_flip": config.data.horizontal_flip,
    }

    def draw(epoch: int, watch: Callable = nothing) -> tuple[np.ndarray, np.ndarray, Prompts]:
        found = preferences.winner_first(preferences.make_batch(source, epoch=epoch, watch=watch, **how))
        return found.images, found.labels, _captions(found.prompts, loaded)

    if not config.data.cache:
        return draw, {"make_encoder": make_encoder, **settings}
    cache = _open_cache(config, loaded, source)

    def recall(epoch: int, watch: Callable = nothing) -> tuple[Recalled, np.ndarray, Prompts]:
        found = preferences.recall_batch(source, cache, epoch=epoch, watch=watch, **how)
        return found.pictures, found.labels, _captions(found.prompts, loaded)

    return recall, {"make_encoder": make_recalling_encoder, **settings}


def online_dpo(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings of Diffusion-DPO on the model's own samples."""
    folder = config.dpo.save_pairs
    settings = {
        "objective": objective_of(config),
        "judging": judging_of(config, loaded),
        "num_samples_per_prompt": config.sample.num_samples_per_prompt,
        "num_pairs": config.dpo.num_pairs,
        "votes": choose({"reward": None, "majority": loaded.weights}, config.dpo.vote, "dpo.vote"),
        "reference_every": config.dpo.reference_every,
        "save": partial(preferences.save_round, Path(folder).expanduser()) if folder else None,
    }
    return prompts_of(config, loaded), settings


def objective_of(config: ConfigDict) -> Objective:
    return Objective(config.dpo.loss, config.dpo.beta, config.dpo.label_smoothing, config.train.num_noise_draws)


def reward_backprop(config: ConfigDict, loaded: Loaded) -> tuple[Callable, dict[str, Any]]:
    """The prompts of a round, and the settings of reward backpropagation."""
    reward = config.reward
    if reward.combine != "weighted_sum" or reward.standardise or reward.gates:
        raise UserError(
            f"reward_backprop follows the gradient of a weighted sum, but reward.combine={reward.combine},"
            f" reward.standardise={reward.standardise}, reward.gates={tuple(reward.gates)}: set weighted_sum, False, ()"
        )
    settings = {
        "num_steps": config.sample.num_steps,
        "min_grad_steps": config.backprop.min_steps,
        "max_grad_steps": config.backprop.max_steps,
    }
    return prompts_of(config, loaded), settings


def _open_cache(config: ConfigDict, loaded: Loaded, source: image_text.ImageText | preferences.Pairs) -> Cache:
    """The folder data.cache, for the pictures of this source."""
    if source.identity is None:
        raise UserError(
            f"data.cache: data.source={config.data.source!r} gives new pictures in every round; expected a folder or a"
            " prepared data set, whose pictures come again; set ''"
        )
    return open_cache(
        config.data.cache,
        identity={"data set": source.identity(), "resolution": loaded.resolution, **loaded.identify_encoder()},
        latent_shape=loaded.latent_shape,
        dtype=config.data.cache_dtype,
    )


def _captions(texts: Sequence[str], loaded: Loaded) -> Prompts:
    """The captions of a data set's round, with whether each is cut off."""
    cut = set(find_too_long(loaded.tokenizers[0], texts))
    metadata = tuple({"cut": text in cut} for text in texts)
    ids = np.arange(len(texts), dtype=np.int32)
    return Prompts(tuple(texts), tokenize_all(loaded.tokenizers, texts), ids, metadata)


def _samples(config: ConfigDict) -> int:
    return config.sample.num_prompts * config.sample.num_samples_per_prompt


def _pairs(config: ConfigDict) -> int:
    return config.sample.num_prompts * config.dpo.num_pairs


def _data(config: ConfigDict) -> int:
    return config.data.batch_size


def _steps(config: ConfigDict) -> int:
    return config.sample.window or config.sample.num_steps


def _noise_draws(config: ConfigDict) -> int:
    return config.train.num_noise_draws


METHODS = {
    "ddpo_is": Method(ddpo_is, _samples, _samples, _steps),
    "ddpo_sf": Method(ddpo, _samples, _samples, _steps),
    "rwr": Method(rwr, _samples, _samples, _noise_draws),
    "sparse_rwr": Method(sparse_rwr, _samples, _samples, _noise_draws),
    "sft": Method(sft, _data, _data, _noise_draws),
    "diffusion_dpo": Method(diffusion_dpo, _data, _data, _noise_draws),
    "online_dpo": Method(online_dpo, _samples, _pairs, _noise_draws),
    "reward_backprop": Method(reward_backprop, _samples, _samples, lambda config: 1),
}


def method_of(config: ConfigDict) -> Method:
    """The config's method. Raises UserError if there is none of its name."""
    return choose(METHODS, config.algorithm, "algorithm")
