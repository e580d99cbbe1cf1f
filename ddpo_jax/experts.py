"""Several experts' scores -> one reward a sample, on the host.

An expert of weight 0 is only watched, unless a gate reads it. A sample that lacks a score which counts has no reward.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from ddpo_jax.errors import RunStopped, UserError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
GATE = re.compile(rf"\s*(?P<name>.+?)\s*(?P<sign>>=|<=)\s*(?P<limit>{NUMBER})\s*", re.IGNORECASE)
CONSTANT = 1e-6  # of its mean: an expert whose deviation is no more has given one number, but for rounding
SIGNS = {">=": operator.ge, "<=": operator.le}


class Combination(NamedTuple):
    """How the experts count together."""

    init: Callable  # () -> carry, an array tree that is checkpointed
    update: Callable  # carry, scores (b, experts) of a round -> rewards (b,) float32, carry
    judge: Callable  # scores (b, experts), Scale -> rewards (b,) float32; the same of the same, in every evaluation


class Moments(NamedTuple):
    """Of every finite score that an expert has given."""

    count: Int[Any, " experts"]
    mean: Float[Any, " experts"]
    squares: Float[Any, " experts"]  # Σ (s - mean)²


class Scale(NamedTuple):
    """What a score is measured by: (s - mean) / std."""

    mean: Float[Any, " experts"]
    std: Float[Any, " experts"]


class Gate(NamedTuple):
    """A condition on one expert's own score."""

    column: int
    holds: Callable  # score, limit -> bool
    limit: float


def raw(reduce: Callable) -> Combination:
    """The scores as they are. reduce: scores to combine, scores as given -> rewards."""
    return Combination(
        init=lambda: (),
        update=lambda carry, scores: (reduce(scores, scores), carry),
        judge=lambda scores, scale: reduce(scores, scores),
    )


def standardised(reduce: Callable, *, num_experts: int) -> Combination:
    """Each expert's scores in standard deviations over all that it has given in this run, this round's among them.

    z_k = (s_k - mean_k) / std_k, by the running moments of Chan et al. 1983; not divided while an expert has only given
    one number, but for rounding. `judge` takes the scale it is given instead, that of the run's first evaluation, so
    that what evaluations say can be compared.
    """

    def init() -> Moments:
        zeros = np.zeros(num_experts, np.float32)
        return Moments(np.zeros(num_experts, np.int32), zeros, zeros)

    def update(carry: Moments, scores: Float[np.ndarray, "b experts"]) -> tuple[Float32[np.ndarray, " b"], Moments]:
        carry = _extend(carry, scores)
        std = np.sqrt(carry.squares / np.maximum(carry.count, 1))
        return judge(scores, Scale(carry.mean, std)), carry

    def judge(scores: Float[np.ndarray, "b experts"], scale: Scale) -> Float32[np.ndarray, " b"]:
        varies = scale.std > CONSTANT * np.abs(scale.mean)
        return reduce((scores.astype(np.float64) - scale.mean) / np.where(varies, scale.std, 1.0), scores)

    return Combination(init, update, judge)


def scale_of(scores: Float[np.ndarray, "b experts"]) -> Scale:
    """The scale of one batch, NaN of an expert without scores."""
    columns = [column[np.isfinite(column)] for column in scores.T]
    means, stds = ([of(column) if len(column) else np.nan for column in columns] for of in (np.mean, np.std))
    return Scale(np.array(means, np.float32), np.array(stds, np.float32))


def weighted_sum(scores: Float[np.ndarray, "b experts"], weights: Float[np.ndarray, " n"]) -> Float32[np.ndarray, " b"]:
    """r = Σ_k w_k s_k over the experts with w_k ≠ 0; NaN if one of them is missing.

    Raises: UserError if there is not one weight an expert.
    """
    return _weighed(scores, weights).sum(axis=1).astype(np.float32)


def minimum(scores: Float[np.ndarray, "b experts"], weights: Float[np.ndarray, " n"]) -> Float32[np.ndarray, " b"]:
    """r = min_k w_k s_k over the experts with w_k ≠ 0; NaN if one of them is missing.

    The worst expert is the one that is learned from (Coste et al. 2023, worst-case optimisation): give it scores of one
    scale, or standardise them.

    Raises: UserError if there is not one weight an expert.
    """
    return _weighed(scores, weights).min(axis=1).astype(np.float32)


def gated(
    rewards: Float32[np.ndarray, " b"], scores: Float[np.ndarray, "b experts"], gates: Sequence[Gate]
) -> Float32[np.ndarray, " b"]:
    """The rewards where all gates hold; elsewhere the lowest of those, so that no closed gate beats an open one.

    Where no gate of the batch holds for any sample, all have the lowest reward of the batch, and none is better than
    another. A sample whose gate has no score has no reward.
    """
    rewards = rewards.copy()
    columns = [gate.column for gate in gates]
    rewards[~np.isfinite(scores[:, columns]).all(axis=1)] = np.nan
    present = np.isfinite(rewards)
    opened = np.all([gate.holds(scores[:, gate.column], gate.limit) for gate in gates], axis=0)
    among = rewards[present & opened] if (present & opened).any() else rewards[present]
    if len(among):
        rewards[present & ~opened] = among.min()
    return rewards


REDUCTIONS = {"weighted_sum": weighted_sum, "minimum": minimum}


def make(
    names: Sequence[str], weights: Float32[np.ndarray, " n"], *, reduction: str, standardise: bool, gates: Sequence[str]
) -> Combination:
    """The combination that the config names: `reward.combine`, `reward.standardise`, `reward.gates`.

    Raises: UserError for a reduction that is none of REDUCTIONS, and for a gate that names no expert.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"reward.combine={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    found = [_parse_gate(gate, names) for gate in gates]

    def reduce(
        scaled: Float[np.ndarray, "b experts"], scores: Float[np.ndarray, "b experts"]
    ) -> Float32[np.ndarray, " b"]:
        rewards = REDUCTIONS[reduction](scaled, weights)
        return gated(rewards, scores, found) if found else rewards

    return standardised(reduce, num_experts=len(names)) if standardise else raw(reduce)


def check_missing(
    rewards: Float[np.ndarray, " b"],
    scores: Float[np.ndarray, "b experts"],
    *,
    max_missing: float,
    names: Sequence[str],
    why: str = "",
    count: int | None = None,
) -> None:
    """Stops the run when too many samples have no reward.

    max_missing: the fraction of the batch that may be missing, from 0 (none) to 1 (all).
    why: what the scorers say of the last one that is missing.
    count: samples of the whole batch, where these are only the first of it.

    Raises: RunStopped above it, with the number each expert lacks.
    """
    missing, count = ~np.isfinite(rewards), len(rewards) if count is None else count
    if missing.sum() > max_missing * count:
        lacking = [f"{name} {n}" for name, n in zip(names, np.isnan(scores).sum(axis=0), strict=True)]
        raise RunStopped(
            f"{missing.sum()} of {count} rewards are missing ({missing.sum() / count:.1%}; reward.max_missing allows "
            f"{max_missing:.1%}): {', '.join(lacking)}. "
            + (f"The last: {why}" if why else "A reward is missing if its picture or its score is not finite.")
        )


def report(
    names: Sequence[str], scores: Float[np.ndarray, "b experts"], rewards: Float[np.ndarray, " b"]
) -> dict[str, float | int]:
    """Mean and deviation of the rewards that are there, how many are missing, and the same of each expert's scores."""
    found = rewards[np.isfinite(rewards)]
    told: dict[str, float | int] = {
        "reward/mean": float(found.mean()) if len(found) else float("nan"),
        "reward/std": float(found.std()) if len(found) else float("nan"),
        "reward/missing": len(rewards) - len(found),
    }
    for name, mean, std in zip(names, *scale_of(scores), strict=True):
        told |= {f"reward/{name}": float(mean), f"reward/{name}/std": float(std)}
    return told


def first_known(scale: Scale, later: Scale) -> Scale:
    """Of each expert the first of the two that has one."""
    known = np.isfinite(scale.mean)
    return Scale(np.where(known, scale.mean, later.mean), np.where(known, scale.std, later.std))


def scale_told(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Scale:
    """Of each expert the first Scale that `report` told of, back from JSON; NaN if it never had scores."""
    scale = Scale(*np.full((2, len(names)), np.nan, np.float32))
    for row in rows:
        columns = [[row.get(f"reward/{name}{end}") for name in names] for end in ("", "/std")]
        scale = first_known(scale, Scale(*(np.array(column, np.float32) for column in columns)))
    return scale


def _weighed(
    scores: Float[np.ndarray, "b experts"], weights: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "b counted"]:
    if weights.shape != scores.shape[1:]:
        raise UserError(f"reward weights {weights.tolist()} must be one for each of {scores.shape[1]} rewards")
    counted = weights != 0
    return scores[:, counted] * weights[counted]


def _extend(moments: Moments, scores: Float[np.ndarray, "b experts"]) -> Moments:
    present = np.isfinite(scores)
    new = present.sum(axis=0)
    filled = np.where(present, scores, 0).astype(np.float64)
    mean = filled.sum(axis=0) / np.maximum(new, 1)
    squares = (np.where(present, filled - mean, 0) ** 2).sum(axis=0)
    count = moments.count + new
    share = new / np.maximum(count, 1)
    apart = mean - moments.mean
    return Moments(
        count.astype(np.int32),
        (moments.mean + apart * share).astype(np.float32),
        (moments.squares + squares + apart**2 * moments.count * share).astype(np.float32),
    )


def _parse_gate(text: str, names: Sequence[str]) -> Gate:
    match = GATE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match["name"] not in names:
        raise UserError(
            f"reward.gates: {text!r} is no gate; expected one of {', '.join(names)} with >= or <= and a number, such as"
            f" '{names[0]}>=0.5'"
        )
    return Gate(list(names).index(match["name"]), SIGNS[match["sign"]], float(match["limit"]))
