"""Rewards: pictures and prompts -> scores, on the device or on the host, one expert or several."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.plugins import load_object
from ddpo_jax.rewards import (
    aesthetic,
    bert_score,
    chat,
    clip,
    clip_score,
    image_reward,
    jpeg,
    jpeg_estimate,
    learned,
    vlm,
)
from ddpo_jax.rewards.kinds import Scores, nothing, on_device, on_host, take, texts
from ddpo_jax.rewards.pixels import PixelBatch
from ddpo_jax.sharding import first_device
from ddpo_jax.types import Prompts, PyTree, Reward

__all__ = ["DEVICE", "HOST", "Scores", "Settings", "join", "make", "on_device", "on_host", "probe", "shuffled", "take"]


class Settings(NamedTuple):
    """What scorers are made with: the fields of the config's `reward` that they read."""

    deadline: float  # these two as in `on_host`
    num_workers: int
    clip_model: str = ""
    clip_template: str = "{}"
    aesthetic_model: str = ""
    aesthetic_clip: str = ""
    pickscore_model: str = ""
    hpsv2_model: str = ""
    sciscore_model: str = ""
    imagereward_model: str = ""
    imagereward_tokenizer: str = ""
    learned_model: str = ""
    learned_clip: str = ""
    bert_model: str = ""
    bert_layer: int = 0
    vlm_url: str = ""
    vlm_model: str = ""
    vlm_key: str = "OPENAI_API_KEY"
    vlm_question: str = vlm.QUESTION
    vlm_lowest: float = 0.0
    vlm_highest: float = 10.0
    vlm_concurrency: int = 32
    vlm_timeout: float = 60.0
    vlm_retries: int = 3
    vlm_max_tokens: int = 128


def vlm_server(settings: Settings) -> chat.Settings:
    """Where and how the vision-language model is asked. It has done before the deadline of `on_host` has passed."""
    return chat.Settings(
        url=settings.vlm_url,
        model=settings.vlm_model,
        key=settings.vlm_key,
        concurrency=settings.vlm_concurrency,
        timeout=settings.vlm_timeout,
        retries=settings.vlm_retries,
        max_tokens=settings.vlm_max_tokens,
        deadline=0.8 * settings.deadline,
    )


# Scorers on the host, by what makes them: settings -> (fn, prepare), as `on_host` reads them
HOST = {
    "jpeg_compressibility": lambda settings: (jpeg.jpeg_compressibility, texts),
    "jpeg_incompressibility": lambda settings: (jpeg.jpeg_incompressibility, texts),
    "vlm_questions": lambda settings: vlm.make_questions(vlm_server(settings)),
    "vlm_judge": lambda settings: vlm.make_judge(
        vlm_server(settings), question=settings.vlm_question, low=settings.vlm_lowest, high=settings.vlm_highest
    ),
    "vlm_bertscore": lambda settings: vlm.make_captioned(
        vlm_server(settings),
        lambda: bert_score.recall(bert_score.load(settings.bert_model, layer=settings.bert_layer)),
        reference=vlm.REFERENCE,
    ),
    "vlm_clip": lambda settings: vlm.make_captioned(
        vlm_server(settings), lambda: clip.text_similarity(clip.load(settings.clip_model)), reference="{prompt}"
    ),
}

# Scorers that JAX traces, by what makes them: settings, place -> (pure, prepare, params), as `on_device` reads them
DEVICE = {
    "clip_score": lambda settings, place: clip_score.make(settings.clip_model, settings.clip_template, place=place),
    "aesthetic_score": lambda settings, place: aesthetic.make(
        settings.aesthetic_model, settings.aesthetic_clip, place=place
    ),
    "pickscore": lambda settings, place: clip_score.make_pickscore(settings.pickscore_model, place=place),
    "hpsv2": lambda settings, place: clip_score.make_hpsv2(settings.hpsv2_model, place=place),
    "jpeg_compressibility_estimate": lambda settings, place: (jpeg_estimate.pure_compressibility, nothing, ()),
    "jpeg_incompressibility_estimate": lambda settings, place: (jpeg_estimate.pure_incompressibility, nothing, ()),
    "sciscore": lambda settings, place: clip_score.make_sciscore(settings.sciscore_model, place=place),
    "image_reward": lambda settings, place: image_reward.make(
        settings.imagereward_model, settings.imagereward_tokenizer, place=place
    ),
    "learned_reward": lambda settings, place: learned.make(settings.learned_model, settings.learned_clip, place=place),
}


def make(
    names: str, settings: Settings, *, weights: Sequence[float | int] | None = None, place: Callable = first_device
) -> tuple[Reward, tuple[PyTree, ...]]:
    """The reward that the config names, and its parameters for `Frozen.reward`, one tree an expert.

    names: one name or several with commas between, each
      - a name in one of the tables above, such as "jpeg_compressibility";
      - "module:function", a scorer of yours on the host: fn(images, prompts) -> (b,), with images a float32 numpy
        array (b, H, W, 3) in [0, 1] and prompts a tuple of b strings; it runs on threads, so it may be slow;
      - "metadata:module:function", one that reads what the prompt source knows too: fn(images, prompts, metadata), with
        a mapping a picture;
      - "device:module:function", one that JAX can trace: fn(images) -> (b,);
      - "maker:module:function", a function that makes one with parameters, or one that reads the prompts: fn(settings,
        place) -> (pure, prepare, params), as in DEVICE. Only these two, and those in DEVICE, have a gradient.

    weights: as in `join`.  place: as in read_weights, of their parameters.

    Raises: UserError for a name that is none of these, for one given twice, and for a model that cannot be loaded.
    """
    experts = [_make_expert(name, settings, place) for name in names_of(names)]
    return join([reward for reward, _ in experts], weights), tuple(params for _, params in experts)


def names_of(names: str) -> tuple[str, ...]:
    """The experts of a `reward.name`."""
    return tuple(name.strip() for name in names.split(","))


def join(rewards: Sequence[Reward], weights: Sequence[float | int] | None = None) -> Reward:
    """Several experts as one reward, a column each. Its params are a tuple, one tree an expert, even if there is one.

    All experts have the pictures before the first result is waited for. `pure` is their weighted sum, whose inputs are
    a tuple too; it is there if all that count can be traced.

    weights: of each expert in `pure`, 0 for one that does not count; None is 1, and no `pure` for several.

    Raises: UserError if there is no reward or a name comes twice.
    """
    names = tuple(name for reward in rewards for name in reward.names)
    if not names or len(set(names)) < len(names):
        raise UserError(f"reward.name must give one reward or several different ones, not {', '.join(names) or 'none'}")

    def submit(params: tuple[PyTree, ...], images: PixelBatch, prompts: Prompts) -> list[PyTree]:
        return [reward.submit(own, images, prompts) for reward, own in zip(rewards, params, strict=True)]

    def result(pending: list[PyTree]) -> Float32[np.ndarray, "b experts"]:
        return np.concatenate([reward.result(own) for reward, own in zip(rewards, pending, strict=True)], axis=1)

    def why(pending: list[PyTree]) -> str:
        told = [(reward, reward.why(own)) for reward, own in zip(rewards, pending, strict=True) if reward.why]
        return "; ".join(f"{', '.join(reward.names)}: {reason}" for reward, reason in told if reason)

    scales = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
    counted = [(k, scale) for k, scale in enumerate(scales) if scale]

    def prepare(prompts: Prompts) -> tuple[PyTree, ...]:
        return tuple(rewards[k].prepare(prompts) for k, _ in counted)

    def pure(params: tuple[PyTree, ...], images: PixelBatch, inputs: tuple[PyTree, ...]) -> Float[Array, " b"]:
        scores = [
            scale * rewards[k].pure(params[k], images, own) for (k, scale), own in zip(counted, inputs, strict=True)
        ]
        return sum(scores[1:], start=scores[0])

    traced = all(rewards[k].pure for k, _ in counted) and (weights is not None or len(rewards) == 1)
    return Reward(names, submit, result, pure if traced else None, why, prepare if traced else None)


def shuffled(scores: Float32[np.ndarray, "b experts"], key: Key[Any, ""]) -> Float32[np.ndarray, "b experts"]:
    """The same scores dealt out anew among the pictures: a control, from which nothing can be learned.

    A picture without any score keeps none; what one expert lacks is dealt out with the rest. The order follows from
    `key`.
    """
    scores, rng = scores.copy(), np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    present = np.isfinite(scores).any(axis=1)
    scores[present] = rng.permutation(scores[present])
    return scores


def probe(
    reward: Reward,
    params: tuple[PyTree, ...],
    prompts: Prompts,
    *,
    resolution: int,
    combine: Callable = lambda scores: scores.sum(axis=1),
) -> None:
    """Scores grey pictures for these prompts, so that a reward that cannot work says so before any work is done.

    combine: scores (b, experts) -> rewards (b,); an expert that is only watched may give nothing.

    Raises: what `result` raises; RunStopped if no picture has a reward, and an expert says why.
    """
    images = jnp.full((len(prompts.texts), resolution, resolution, 3), 0.5, jnp.float32)
    pending = reward.submit(params, images, prompts)
    nothing = np.isnan(combine(reward.result(pending))).all()
    reason = reward.why(pending) if reward.why and nothing else ""
    if reason:
        raise RunStopped(f"the reward gave no score for two grey pictures, which it was tried on: {reason}")


def _make_expert(name: str, settings: Settings, place: Callable) -> tuple[Reward, PyTree]:
    threads = {"deadline": settings.deadline, "num_workers": settings.num_workers}
    match name.split(":"):
        case [known] if known in HOST:
            fn, prepare = HOST[known](settings)
            return on_host(name, fn, prepare=prepare, **threads), ()
        case [known] if known in DEVICE:
            return _trace(name, DEVICE[known], settings, place)
        case [_, _]:
            return on_host(name, load_object(name), **threads), ()
        case ["metadata", module, function]:
            fn = load_object(f"{module}:{function}")
            return on_host(name, lambda images, prompts: fn(images, *prompts), prepare=_told, **threads), ()
        case ["device", module, function]:
            fn = load_object(f"{module}:{function}")
            return on_device(name, lambda params, images, inputs: fn(images), nothing), ()
        case ["maker", module, function]:
            return _trace(name, load_object(f"{module}:{function}"), settings, place)
    known = sorted([*HOST, *DEVICE])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"reward.name: there is no reward {name!r}.{hint} Choose from {', '.join(known)}, or give a function of "
        "yours as module:function (or device:module:function if JAX can trace it)."
    )


def _trace(name: str, maker: Callable, settings: Settings, place: Callable) -> tuple[Reward, PyTree]:
    try:
        pure, prepare, params = maker(settings, place)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"reward {name}: expected a function of (settings, place) that returns (pure, prepare, params); it raised"
            f" {type(error).__name__}: {error}"
        ) from error
    return on_device(name, pure, prepare), params


def _told(prompts: Prompts) -> tuple[tuple[str, ...], tuple[Mapping[str, Any], ...]]:
    return prompts.texts, prompts.metadata
