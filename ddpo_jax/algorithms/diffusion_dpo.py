"""Diffusion-DPO: denoise what is preferred better than the reference does, the rest worse (Wallace et al. 2023).

Offline from a data set of pairs, or online from pairs of the model's own samples, the best against the worst of a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8

from ddpo_jax import losses, multihost, pairing
from ddpo_jax.algorithms.judged import Judging, judged_rollouts
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.algorithms.regression import check_noise_draws, row_keys
from ddpo_jax.errors import UserError
from ddpo_jax.losses import PairErrors
from ddpo_jax.process import choose
from ddpo_jax.types import Algorithm, Frozen, Metrics, Prompts, PyTree, Recalled


class Pairs(NamedTuple):
    """A round of pairs. What is on the devices may be longer than b, to be cut evenly."""

    cond: PyTree
    x_0: Float[Any, "b 2 h w c"]  # the winner, the loser
    preference: Float[Any, " b"]  # how surely the first wins, from ½ to 1
    weight: Float[Any, " b"]  # 0 of a tie
    reference: PyTree  # what is trained as it was when the reference was last refreshed; () where that is frozen
    drift: Float[Any, " 2"]  # of KTO, before the first update: the sum of m_ref - m over rows, and how many those are


class Objective(NamedTuple):
    """What of the pairs is minimised."""

    kind: str  # "sigmoid" (DPO), "ipo" or "kto"
    beta: float
    label_smoothing: float  # the chance that a label is wrong, below ½
    num_noise_draws: int  # (t, ε) a pair and pass


class Carry(NamedTuple):
    """Of online pairs, from one round to the next."""

    experts: PyTree
    round: Int[Any, ""]
    reference: PyTree


def offline(parts: Parts, *, objective: Objective, make_encoder: Callable, prompt_dropout: float) -> Algorithm:
    """Diffusion-DPO on pairs of a data set, against the pretrained model.

    make_encoder: one of `encode`, by what a round's pictures come as, the winners first: (b, 2, H, W, 3), or Recalled.
    prompt_dropout: the fraction of pairs that train the unconditional branch; 0.2 is published.
    """
    encode = make_encoder(parts, prompt_dropout=prompt_dropout)

    def collect(
        trainable: PyTree,
        frozen: Frozen,
        inputs: tuple[UInt8[np.ndarray, "b 2 H W 3"] | Recalled, Float32[np.ndarray, " b"], Prompts],
        carry: PyTree,
        key: Key[Array, ""],
    ) -> tuple[Pairs, PyTree, dict[str, float | int]]:
        pictures, labels, prompts = inputs
        cond, x_0 = encode(frozen, pictures, prompts.tokens, key)
        sure = np.maximum(labels, 1 - labels)
        weight = (sure > 0.5).astype(np.float32)
        report = {
            "pairs/left_out": float((weight == 0).sum()),
            "captions/cut": float(sum(entry["cut"] for entry in prompts.metadata)),
        }
        return make_pairs(cond, x_0, sure, weight, objective), carry, report

    return _algorithm(
        parts, objective, init=lambda trainable: (), collect=collect, reference=lambda frozen, batch: frozen.denoiser
    )


def online(
    parts: Parts,
    *,
    objective: Objective,
    judging: Judging,
    num_samples_per_prompt: int,
    num_pairs: int,
    votes: np.ndarray | None,
    reference_every: int,
    save: Callable | None,
) -> Algorithm:
    """Diffusion-DPO on pairs of a round's own samples: the K best of each draw of a prompt against its K worst.

    num_pairs: K.  votes: weights of the experts that choose by majority; None: the reward chooses.
    reference_every: rounds after which the reference becomes what is trained now; 0: it stays the pretrained model.
    save: round, prompts, images (b, H, W, 3), scores (b, experts), pairs -> None, where pairs are to be kept.
    """
    if reference_every < 0:
        raise UserError(f"dpo.reference_every={reference_every}: expected 0 (never) or more rounds")
    pairing.best_against_worst(np.zeros(0), group_size=num_samples_per_prompt, num_pairs=num_pairs)  # raises if it must
    layout = parts.layout

    @jax.jit
    def gather(cond: PyTree, x_0: Float[Array, "n h w c"], win: Int[Array, " b"], lose: Int[Array, " b"]) -> PyTree:
        win, lose = layout.rows((win, lose))
        return layout.rows((jax.tree.map(lambda x: x[win], cond), jnp.stack([x_0[win], x_0[lose]], axis=1)))

    @jax.jit
    def as_bytes(images: Float[Array, "b H W 3"]) -> UInt8[Array, "b H W 3"]:
        return jnp.rint(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8)

    @jax.jit
    def copied(trainable: PyTree) -> PyTree:
        return layout.keep(jax.tree.map(jnp.array, trainable))

    def init(trainable: PyTree) -> Carry:
        reference = copied(trainable) if reference_every else ()
        return Carry(judging.experts.init(), np.zeros((), np.int32), reference)

    def keep(cond: PyTree, trajectory: Any, images: Float[Array, "b H W 3"]) -> tuple:
        shown = as_bytes(images) if save else ()
        return cond, trajectory.x[:, -1], shown

    def collect(
        trainable: PyTree, frozen: Frozen, prompts: Prompts, carry: Carry, key: Key[Array, ""]
    ) -> tuple[Pairs, Carry, dict[str, float | int]]:
        if reference_every and carry.round % reference_every == 0:
            carry = carry._replace(reference=copied(trainable))
        judged = judged_rollouts(parts, judging, trainable, frozen, prompts, carry.experts, key, keep=keep)
        cond, x_0, images = judged.kept
        rewards = judged.rewards
        if votes is not None:
            rewards = pairing.majority(judged.scores, votes, group_size=num_samples_per_prompt)
        chosen = pairing.best_against_worst(rewards, group_size=num_samples_per_prompt, num_pairs=num_pairs)
        filler = -len(chosen.win) % layout.num_shards
        win, lose = (np.concatenate([of, np.repeat(of[-1:], filler)]) for of in (chosen.win, chosen.lose))
        cond, x_0 = gather(cond, x_0, win, lose)
        if save:
            shown = multihost.to_host(images)
            multihost.on_main(lambda: save(int(carry.round), prompts.texts, shown, judged.scores, chosen))
        sure, weight = np.ones(len(chosen.win), np.float32), chosen.valid.astype(np.float32)
        batch = make_pairs(cond, x_0, sure, weight, objective)._replace(reference=carry.reference)
        report = judged.report | {"pairs/left_out": float((weight == 0).sum())}
        return batch, Carry(judged.seen, np.array(carry.round + 1, np.int32), carry.reference), report

    def reference(frozen: Frozen, batch: Pairs) -> PyTree:
        return parts.merge(frozen.denoiser, batch.reference) if reference_every else frozen.denoiser

    refreshed = reference_every > 0
    return _algorithm(parts, objective, init=init, collect=collect, reference=reference, refreshed=refreshed)


def make_pairs(
    cond: PyTree,
    x_0: Float[Array, "n 2 h w c"],
    sure: Float32[np.ndarray, " b"],
    weight: Float32[np.ndarray, " b"],
    objective: Objective,
) -> Pairs:
    """Pairs of a frozen reference. sure: how surely the first wins, before labels are smoothed."""
    smoothing = objective.label_smoothing
    preference = (sure * (1 - smoothing) + (1 - sure) * smoothing).astype(np.float32)
    return Pairs(cond, x_0, preference, weight, (), np.zeros(2, np.float32))


def kto(errors: PairErrors, batch: Pairs, sample: Int[Array, " r"], beta: float) -> tuple[Float[Array, " r"], Metrics]:
    """`losses.kto` of both pictures of a pair, the winner as one that is liked and the loser as one that is not.

    A pair counts 2 p - 1, so that one whose label says next to nothing counts for next to nothing.
    """
    baseline = batch.drift[0] / jnp.maximum(batch.drift[1], 1)
    ones = jnp.ones_like(errors.win)
    win, win_metrics = losses.kto(errors.win, errors.reference_win, ones, baseline, beta=beta)
    lose, lose_metrics = losses.kto(errors.lose, errors.reference_lose, 0 * ones, baseline, beta=beta)
    gain = 0.5 * (win_metrics.mean["gain"] + lose_metrics.mean["gain"])
    metrics = losses.preference_metrics(errors, beta * losses.log_ratio(errors))
    sure = 2 * batch.preference[sample] - 1
    return sure * 0.5 * (win + lose), metrics._replace(mean={**metrics.mean, "gain": gain})


def drift_written(batch: Pairs, rows: Int[Any, "r 2"], weight: Float[Any, " r"], metrics: Metrics) -> Pairs:
    """The batch with these rows' gains added: an Algorithm's `recompute`, for KTO's baseline."""
    gain = multihost.to_host(metrics.mean["gain"])
    seen = np.array([np.sum(gain * np.asarray(weight)), np.sum(np.asarray(weight))], np.float32)
    return batch._replace(drift=batch.drift + seen)


# errors, batch, the pairs of the rows, β -> losses of rows
LOSSES = {
    "sigmoid": lambda errors, batch, sample, beta: losses.diffusion_dpo(errors, batch.preference[sample], beta=beta),
    "ipo": lambda errors, batch, sample, beta: losses.ipo(errors, batch.preference[sample], beta=beta),
    "kto": lambda errors, batch, sample, beta: kto(errors, batch, sample, beta),
}


def _algorithm(
    parts: Parts,
    objective: Objective,
    *,
    init: Callable,
    collect: Callable,
    reference: Callable,
    refreshed: bool = False,
) -> Algorithm:
    """reference: frozen, batch -> the reference's denoiser.  refreshed: it is the batch's, but for what LoRA leaves."""
    row_losses = choose(LOSSES, objective.kind, "dpo.loss")
    if not objective.beta > 0:
        raise UserError(f"dpo.beta={objective.beta}: expected a positive number; 2000 to 5000 is published")
    if not 0 <= objective.label_smoothing < 0.5:
        raise UserError(f"dpo.label_smoothing={objective.label_smoothing}: expected 0 or more, below 0.5")
    if objective.kind == "kto" and objective.label_smoothing:
        raise UserError(f"dpo.label_smoothing={objective.label_smoothing}: kto knows no smoothing; set 0")
    check_noise_draws(objective.num_noise_draws)
    layout = parts.layout

    def loss(
        params: PyTree, frozen: Frozen, batch: Pairs, rows: Int[Array, "r 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " r"], Metrics]:
        sample = rows[:, 0]
        twice = jnp.repeat(rows, 2, axis=0)  # winner and loser side by side: one t and one ε, one program
        cond = jax.tree.map(lambda x: jnp.repeat(x[sample], 2, axis=0), batch.cond)
        x_0 = batch.x_0[sample].reshape(-1, *batch.x_0.shape[2:])
        keys = row_keys(key, twice)
        error = parts.policy.denoising_error(params, x_0, cond, keys)
        fixed = jax.lax.stop_gradient(layout.gather(reference(frozen, batch)))
        error_reference = parts.policy.denoising_error(fixed, x_0, cond, keys)
        errors = PairErrors(error[::2], error[1::2], error_reference[::2], error_reference[1::2])
        return row_losses(errors, batch, sample, objective.beta)

    def slices(batch: Pairs) -> Bool[np.ndarray, "b s"]:
        return np.repeat(np.asarray(batch.weight)[:, None] > 0, objective.num_noise_draws, axis=1)

    return Algorithm(
        init=init,
        collect=collect,
        loss=loss,
        slices=slices,
        recompute=drift_written if objective.kind == "kto" else None,
        check=lambda first: None,
        stop=lambda scalars: None,
        reads_reference=not refreshed,
    )
