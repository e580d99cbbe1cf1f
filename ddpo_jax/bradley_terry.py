"""Fitting a head to preferences among pictures that a frozen CLIP has seen: arrays in, parameters out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int

from ddpo_jax import losses
from ddpo_jax.errors import RunStopped
from ddpo_jax.models.mlp import PreferenceHead, features
from ddpo_jax.types import PyTree

MIN_PROMPTS = 10  # below so many, pairs are held out one by one
PATIENCE = 10  # epochs without a lower held-out loss, after which it stops
CHUNK = 4096  # pairs at a time where none is learned from
# How much more than another feature the cosine of picture and prompt counts when learning begins. What the cosine
# decides is then learned from 860 pairs to 93 % and not 84 % of others; of a JPEG's size it changes nothing.
COSINE = 20.0


class Comparisons(NamedTuple):
    """Pairs of pictures as a CLIP sees them, and which is preferred."""

    prompts: tuple[str, ...]
    pictures: Float32[np.ndarray, "n 2 e"]
    texts: Float32[np.ndarray, "n d"]
    labels: Float32[np.ndarray, " n"]  # how surely the first is the better one


class Settings(NamedTuple):
    """How a head is fitted."""

    hidden: tuple[int, ...]
    learning_rate: float
    weight_decay: float
    batch_size: int
    num_epochs: int
    seed: int


class Judgement(NamedTuple):
    """How well scores foretell preferences."""

    accuracy: float
    log_loss: float  # nats a pair; log 2 of one that knows nothing
    confidence: float  # how often it thinks that it is right: its accuracy, if it is calibrated


class Fitted(NamedTuple):
    """A head, and how it went."""

    params: PyTree
    epoch: int  # of the lowest held-out loss, from 1
    num_epochs: int
    mean: float  # of the training pictures' scores before these were standardised
    std: float
    held_out: Judgement
    trained: Judgement


def take(data: Comparisons, rows: Int[np.ndarray, " m"]) -> Comparisons:
    """These pairs."""
    prompts = tuple(data.prompts[i] for i in rows)
    return Comparisons(prompts, data.pictures[rows], data.texts[rows], data.labels[rows])


def hold_out(prompts: Sequence[str], *, fraction: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Which pairs are held out: all of some prompts, so that none of these is learned from.

    Prompts are taken in an order that follows from `seed` while they hold no more than `fraction` of all pairs. Below
    MIN_PROMPTS prompts, pairs are taken one by one. At least one pair is held out, and at least one is not.
    """
    rng = np.random.default_rng((seed, 0))
    names, index, counts = np.unique(np.asarray(prompts, object), return_inverse=True, return_counts=True)
    if len(names) < MIN_PROMPTS:
        index, counts = np.arange(len(prompts)), np.ones(len(prompts), int)
    wanted = max(fraction * len(prompts), counts.min())
    chosen, held = [], 0
    for group in rng.permutation(len(counts)):
        if held + counts[group] <= wanted and len(chosen) < len(counts) - 1:
            chosen.append(group)
            held += counts[group]
    return np.isin(index, chosen)


def fit(data: Comparisons, held: Bool[np.ndarray, " n"], settings: Settings) -> Fitted:
    """The head of the lowest held-out loss, among those after each epoch of AdamW on the other pairs' `bradley_terry`.

    It learns in features of mean 0 and standard deviation 1 over its training pictures (the cosine: COSINE), and its
    scores come out with mean 0 and standard deviation 1. Both are folded into its parameters, so that the head is a
    plain `PreferenceHead`. An epoch leaves out what does not fill a batch. The epoch is chosen by the held-out pairs,
    which makes their figures a little better than those of fresh ones.

    Raises:
        RunStopped: no epoch ended with a finite loss.
    """
    head = PreferenceHead(settings.hidden)
    learned_from, held_out = take(data, np.flatnonzero(~held)), take(data, np.flatnonzero(held))
    shift = _statistics(learned_from)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    params = head.init(key, jnp.asarray(data.pictures[:1, 0]), jnp.asarray(data.texts[:1]))["params"]
    tx = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    learn, judge_params = _make_epoch(head, tx, shift), _make_scores(head)
    opt_state, arrays = tx.init(params), jax.tree.map(jnp.asarray, learned_from._replace(prompts=()))
    best, best_loss, best_epoch, epoch = None, math.inf, 0, 0
    for epoch, order in enumerate(_orders(len(learned_from.labels), settings), 1):
        params, opt_state = learn(params, opt_state, arrays, order)
        plain = folded(params, *shift)
        loss = judge(judge_params(plain, held_out), held_out.labels).log_loss
        if loss < best_loss:
            best, best_loss, best_epoch = plain, loss, epoch
        if epoch - best_epoch >= PATIENCE:
            break
    if best is None:
        raise RunStopped("the head's loss is not finite; give a lower --learning_rate")
    scores, unseen = judge_params(best, learned_from), judge_params(best, held_out)
    mean, std = float(scores.mean()), float(scores.std()) or 1.0
    return Fitted(
        params=standardised(best, mean, std),
        epoch=best_epoch,
        num_epochs=epoch,
        mean=mean,
        std=std,
        held_out=judge(unseen, held_out.labels),
        trained=judge(scores, learned_from.labels),
    )


def judge(scores: Float32[np.ndarray, "n 2"], labels: Float32[np.ndarray, " n"]) -> Judgement:
    """How well these scores of pairs foretell their labels."""
    loss, metrics = losses.bradley_terry(*(jnp.asarray(x) for x in (*scores.T, labels)))
    confidence = jax.nn.sigmoid(metrics.mean["margin"])
    return Judgement(*(float(x.mean()) for x in (metrics.mean["agreement"], loss, confidence)))


def folded(params: PyTree, mean: Float[Array, " f"], std: Float[Array, " f"]) -> PyTree:
    """The parameters that do to features what `params` do to (features - mean) / std."""
    first = params["layers_0"]
    kernel = first["kernel"] / std[:, None]
    return {**params, "layers_0": {"kernel": kernel, "bias": first["bias"] - mean @ kernel}}


def standardised(params: PyTree, mean: float, std: float) -> PyTree:
    """The parameters whose scores are (score - mean) / std."""
    last = f"layers_{len(params) - 1}"
    kernel, bias = params[last]["kernel"], params[last]["bias"]
    return {**params, last: {"kernel": kernel / std, "bias": (bias - mean) / std}}


def _make_epoch(head: PreferenceHead, tx: optax.GradientTransformation, shift: tuple) -> Callable:
    def loss(params: PyTree, batch: Comparisons) -> Float[Array, ""]:
        plain = folded(params, *shift)
        scores = [head.apply({"params": plain}, batch.pictures[:, k], batch.texts) for k in (0, 1)]
        return losses.bradley_terry(*scores, batch.labels)[0].mean()

    @jax.jit
    def epoch(
        params: PyTree, opt_state: PyTree, data: Comparisons, order: Int[Array, "steps b"]
    ) -> tuple[PyTree, PyTree]:
        def step(state: tuple, rows: Int[Array, " b"]) -> tuple[tuple, None]:
            params, opt_state = state
            grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), order)[0]

    return epoch


def _orders(count: int, settings: Settings) -> Iterator[Int[Array, "steps b"]]:
    size = min(settings.batch_size, count)
    for epoch in range(settings.num_epochs):
        order = np.random.default_rng((settings.seed, 1, epoch)).permutation(count)
        yield jnp.asarray(order[: count // size * size].reshape(-1, size))


def _make_scores(head: PreferenceHead) -> Callable:
    """A function of parameters and pairs: the scores (n, 2) of their pictures."""

    @jax.jit
    def part(params: PyTree, pictures: Float[Array, "m 2 e"], texts: Float[Array, "m d"]) -> Float[Array, "m 2"]:
        return jnp.stack([head.apply({"params": params}, pictures[:, k], texts) for k in (0, 1)], axis=1)

    def scores(params: PyTree, data: Comparisons) -> Float32[np.ndarray, "n 2"]:
        starts = range(0, len(data.labels), CHUNK)
        return np.concatenate(
            [np.asarray(part(params, data.pictures[i : i + CHUNK], data.texts[i : i + CHUNK])) for i in starts]
        )

    return scores


def _statistics(data: Comparisons) -> tuple[Float[Array, " f"], Float[Array, " f"]]:
    """Mean and unit of the features, of the first CHUNK pairs: pairs come in no order."""
    pictures, texts = jnp.asarray(data.pictures[:CHUNK]), jnp.asarray(data.texts[:CHUNK])
    found = np.concatenate([np.asarray(features(pictures[:, k], texts), np.float64) for k in (0, 1)])
    # Where a feature does not vary, as of texts if there is one prompt, there is nothing to divide by.
    std = found.std(axis=0)
    std = np.where(std > 1e-6 * (1e-6 + np.abs(found.mean(axis=0))), std, 1.0)
    std[-1] /= COSINE
    return jnp.asarray(found.mean(axis=0), jnp.float32), jnp.asarray(std, jnp.float32)
