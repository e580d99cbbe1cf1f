"""What the methods share: the parts they are made of, and a scored round of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Key

from ddpo_jax import multihost, rewards
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.policy import sample_keys
from ddpo_jax.sharding import Layout
from ddpo_jax.types import Frozen, Model, Policy, Prompts, PyTree, Reward


class Scored(NamedTuple):
    """A round of samples with their scores."""

    kept: PyTree
    scores: Float32[np.ndarray, "b experts"]  # NaN where missing
    why: str  # of a missing one, as the scorers of this process tell; empty if they tell nothing


class Parts(NamedTuple):
    """What a method may draw on."""

    model: Model
    policy: Policy
    sample: Callable  # policy.make_sampler's program
    reward: Reward | None  # None where the method needs none
    phase: Callable  # name, total -> context manager that gives advance(count)
    layout: Layout
    chunk_size: int  # pictures a program call and shard of the batch
    merge: Callable  # as in Finetune
    shuffled: bool = False  # deal a round's scores to the wrong pictures


def scored_rollouts(
    parts: Parts,
    trainable: PyTree,
    frozen: Frozen,
    prompts: Prompts,
    key: Key[Any, ""],
    *,
    keep: Callable,
    group_size: int = 1,
    noisy: Bool[Any, " T"] | None = None,
    check: Callable = lambda scores, why: None,
) -> Scored:
    """One sample a prompt, and its scores. Kept is keep(cond, trajectory, images) of all samples, on an axis of b.

    Chunks have one shape, so that one program serves every count: the last is filled up with its last prompt, and what
    is kept on the devices stays as long as that. A chunk is scored while the next rolls out. Sample i's noise depends
    on `key` and i alone; what it starts from is shared by `group_size` samples in a row.

    noisy: the denoising steps that are taken with noise; None: all.
    check: (scores, why) of the chunks that were scored so far -> None; may raise RunStopped, so that a scorer that
    gives nothing is not waited for chunk by chunk. It is asked where one process has all pictures.
    """
    count = len(prompts.texts)
    calls = chunks(count, size=parts.chunk_size, num_shards=parts.layout.num_shards)
    kept, pending, failed, why = [], [], None, ""
    with parts.phase("rollout", count) as advance:
        for index in calls:
            chunk = rewards.take(prompts, np.minimum(index, count - 1))
            keys, start_keys = sample_keys(key, index), sample_keys(key, index, group_size=group_size)
            cond, trajectory, images = parts.sample(trainable, frozen, chunk.tokens, keys, start_keys, noisy)
            try:
                pending.append(parts.reward.submit(frozen.reward, images, chunk))
            except (UserError, RunStopped) as error:
                failed = failed or error  # the others hear of it below; until then all take the same steps
            kept.append(keep(cond, trajectory, images))
            jax.block_until_ready(kept[-2:-1])  # the chunk before: one is always under way
            advance(int((index < count).sum()))
        jax.block_until_ready(kept)
    done = np.zeros(0, int)
    scores = np.full((count, len(parts.reward.names)), np.nan, np.float32)
    with parts.phase("reward", count) as advance:
        for index in calls:
            real = index < count
            try:
                if failed is None:
                    first = pending.pop(0)
                    scores[index[real]] = parts.reward.result(first)[real]
                    why = (parts.reward.why and parts.reward.why(first)) or why
                    done = np.concatenate([done, index[real]])
                    if jax.process_count() == 1:
                        check(scores[done], why)
            except (UserError, RunStopped) as error:
                failed = error
            advance(int(real.sum()))
        multihost.agree(failed)
        scores = multihost.gather_scores(scores)
    if parts.shuffled:
        scores = rewards.shuffled(scores, key)
    return Scored(in_order(kept, calls, count, parts.layout), scores, why)


def chunks(count: int, *, size: int, num_shards: int) -> list[Int[np.ndarray, " n"]]:
    """The samples of each program call: the next `size` of every shard's own part of the batch.

    So a device keeps what it makes, and all of it together is in order. The numbers from `count` on fill up.
    """
    num_calls = -(-count // (size * num_shards))
    index = np.arange(num_shards * num_calls * size).reshape(num_shards, num_calls, size)
    return list(index.swapaxes(0, 1).reshape(num_calls, num_shards * size))


def in_order(made: Sequence[PyTree], calls: Sequence[Int[np.ndarray, " n"]], count: int, layout: Layout) -> PyTree:
    """What the calls of `chunks` made, as one batch in order: on the host, or with what fills up on the devices."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(made)):
        order = np.argsort(np.concatenate(calls))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[order[:count]], *made)
    return layout.concatenate(*made)
