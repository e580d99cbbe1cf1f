"""DDPO: denoising as a Markov decision process, rewarded for the finished picture (Black et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax import advantages, losses, multihost
from ddpo_jax.algorithms.judged import Judging, judged_rollouts
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.sharding import Layout
from ddpo_jax.types import Algorithm, Frozen, Metrics, Prompts, PyTree, Trajectory

RATIO_TOLERANCE = 0.1  # of the clip range: the share of it that rounding may take


class Scoring(NamedTuple):
    """From pictures to advantages."""

    judging: Judging
    advantages: advantages.Advantages
    adv_clip_max: float


class Carry(NamedTuple):
    """What is known from one round to the next."""

    experts: PyTree
    advantages: PyTree


class Rollouts(NamedTuple):
    """A round of samples. What is on the devices may be longer, to be cut evenly; only the first b are samples."""

    cond: PyTree
    trajectory: Trajectory
    advantage: Float[Any, " b"]
    weight: Float[Any, " b"]  # 0 where the reward is missing


def importance_sampling(
    parts: Parts,
    *,
    scoring: Scoring,
    num_updates: int,
    clip_range: float,
    old_log_prob: str,
    kl_weight: float,
    kl_budget: float,
    min_timestep: int,
    window: Callable,
) -> Algorithm:
    """DDPO-IS: PPO-clip on denoising steps; several updates a round.

    old_log_prob: `stored` by the rollout, or `recompute`d by the update's own program before the first update, which
    costs that program once more a round (nothing, with one update a round) and makes the first ratio exactly 1.
    kl_weight: of KL(p_θ ‖ p_ref), nats as the log-probs are. kl_budget: the mean KL at which the run ends; 0 is never.
    min_timestep: steps that begin below it are not learned from. window: as `window.make` gives it.
    """
    if clip_range <= 0:
        raise UserError(f"train.clip_range={clip_range}: expected a positive number; 1e-4 is the published value")
    if old_log_prob not in ("stored", "recompute"):
        raise UserError(f"train.old_log_prob={old_log_prob!r}: expected 'stored' or 'recompute'")

    def surrogate(log_prob, log_prob_old, advantage):
        return losses.ppo_clip(log_prob, log_prob_old, advantage, clip_range=clip_range)

    def on_policy(log_prob, log_prob_old, advantage):
        return surrogate(log_prob, jax.lax.stop_gradient(log_prob), advantage)

    def check(first: Mapping[str, float | int]) -> None:
        deviation, allowed = first["ratio_max_deviation"], RATIO_TOLERANCE * clip_range
        if deviation > allowed:
            raise RunStopped(
                f"before the first update the importance ratio is off 1 by {deviation:.1e}, more than "
                f"{RATIO_TOLERANCE} x train.clip_range = {allowed:.1e}: rounding would be learned from."
                " Set train.old_log_prob=recompute, or compute in float32, or widen train.clip_range"
            )

    recompute = old_log_prob == "recompute"
    return _algorithm(
        parts,
        on_policy if recompute and num_updates == 1 else surrogate,
        scoring=scoring,
        kl_weight=kl_weight,
        kl_budget=kl_budget,
        min_timestep=min_timestep,
        window=window,
        recompute=_log_prob_writer(parts.layout) if recompute and num_updates > 1 else None,
        check=check,
    )


def score_function(
    parts: Parts,
    *,
    scoring: Scoring,
    num_updates: int,
    kl_weight: float,
    kl_budget: float,
    min_timestep: int,
    window: Callable,
) -> Algorithm:
    """DDPO-SF: REINFORCE on denoising steps; exactly one update a round.

    Raises:
        UserError: more updates a round are asked for. Samples of an older policy would bias the gradient.
    """
    if num_updates != 1:
        raise UserError(
            f"ddpo_sf makes one update a round, but train.num_updates x train.num_inner_epochs = {num_updates}:"
            " set both to 1, or use algorithm=ddpo_is"
        )
    return _algorithm(
        parts,
        losses.score_function,
        scoring=scoring,
        kl_weight=kl_weight,
        kl_budget=kl_budget,
        min_timestep=min_timestep,
        window=window,
        recompute=None,
        check=lambda first: None,
    )


def _algorithm(
    parts: Parts,
    surrogate: Callable,
    *,
    scoring: Scoring,
    kl_weight: float,
    kl_budget: float,
    min_timestep: int,
    window: Callable,
    recompute: Callable | None,
    check: Callable,
) -> Algorithm:
    reads_reference = kl_weight > 0 or kl_budget > 0

    def collect(
        trainable: PyTree, frozen: Frozen, prompts: Prompts, carry: Carry, key: Key[Array, ""]
    ) -> tuple[Rollouts, Carry, dict[str, float | int]]:
        judged = judged_rollouts(
            parts,
            scoring.judging,
            trainable,
            frozen,
            prompts,
            carry.experts,
            key,
            keep=lambda cond, trajectory, images: (cond, trajectory),
            noisy=window(key),
        )
        advantage, weight, history = scoring.advantages.update(carry.advantages, prompts.id, judged.rewards)
        advantage = advantages.clip(advantage, adv_clip_max=scoring.adv_clip_max)
        return Rollouts(*judged.kept, advantage, weight), Carry(judged.seen, history), judged.report

    def loss(
        params: PyTree, frozen: Frozen, batch: Rollouts, rows: Int[Array, "r 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " r"], Metrics]:
        sample, step = rows[:, 0], rows[:, 1]
        trajectory = batch.trajectory
        x_t, x_next = trajectory.x[sample, step], trajectory.x[sample, step + 1]
        t = trajectory.t[sample, step]
        t_next = parts.policy.after(t)
        cond = jax.tree.map(lambda x: x[sample], batch.cond)

        # Rows are noisy steps alone: outside of a window there are none.
        p = parts.policy.transition(params, x_t, t, t_next, cond, frozen.uncond)
        log_prob = parts.policy.log_prob(p, x_next)
        row_losses, metrics = surrogate(log_prob, trajectory.log_prob[sample, step], batch.advantage[sample])
        mean = {**metrics.mean, "log_prob": log_prob}
        if reads_reference:
            reference = parts.policy.transition(frozen.denoiser, x_t, t, t_next, cond, frozen.uncond)
            kl = parts.policy.kl(p, reference)
            row_losses = row_losses + kl_weight * kl
            mean["kl_reference"] = kl
        return row_losses, metrics._replace(mean=mean)

    def slices(batch: Rollouts) -> Bool[np.ndarray, "b T"]:
        count = len(batch.weight)  # the trajectories go on with what fills them up
        t, trained = multihost.to_host((batch.trajectory.t, batch.trajectory.trained))
        t, trained = t[:count], trained[:count]
        return trained & (t[:, :-1] >= min_timestep) & (np.asarray(batch.weight) > 0)[:, None]

    def stop(scalars: Mapping[str, Any]) -> str | None:
        kl = scalars.get("kl_reference")
        if kl_budget > 0 and kl is not None and kl >= kl_budget:
            return f"the KL to the reference is {kl:.2e} nats a step; train.kl_budget is {kl_budget:.2e}"
        return None

    def init(trainable: PyTree) -> Carry:
        return Carry(scoring.judging.experts.init(), scoring.advantages.init())

    return Algorithm(init, collect, loss, slices, recompute, check, stop, reads_reference)


def _log_prob_writer(layout: Layout) -> Callable:
    @jax.jit
    def written(
        log_prob: Float[Array, "b T"], rows: Int[Array, "r 2"], weight: Float[Array, " r"], seen: Float[Array, " r"]
    ) -> Float[Array, "b T"]:
        sample = jnp.where(weight > 0, rows[:, 0], len(log_prob))  # what only fills up is out of range, and dropped
        return layout.rows(log_prob.at[sample, rows[:, 1]].set(seen, mode="drop"))

    def recompute(batch: Rollouts, rows: Int[Any, "r 2"], weight: Float[Any, " r"], metrics: Metrics) -> Rollouts:
        log_prob = written(batch.trajectory.log_prob, rows, weight, metrics.mean["log_prob"])
        return batch._replace(trajectory=batch.trajectory._replace(log_prob=log_prob))

    return recompute
