"""What a comparison of pictures says, and how surely: means, win rates and diversity with bootstrap intervals.

Pictures of one prompt are alike, so that not pictures but prompts are drawn anew (a cluster bootstrap); of a single
prompt, its pictures. All intervals cover 95 %, and are the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLES = 4000
COVERAGE = 0.95
SEED = 0
BLOCK = 2**22  # counts drawn at a time: 32 MiB


class Estimate(NamedTuple):
    """A number and the interval that it may be off by; NaN where it cannot be told."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two models' rewards at the same prompts and noise, of the pairs that have both."""

    count: int  # pairs
    missing: int  # pairs that lack a reward of either
    difference: Estimate  # mean of a - b
    sigmas: Estimate  # the same in standard deviations of b's pictures, which are taken as exact
    win_rate: Estimate  # P(a > b) + P(a = b) / 2


class Diversity(NamedTuple):
    """Mean distances between a model's pictures."""

    overall: Estimate
    within: Estimate  # between pictures of one prompt; NaN where each has one


def mean(values: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Estimate:
    """The mean of the values that are finite. cluster: which prompt a picture is of."""
    found = np.isfinite(values)
    return _mean(values[found].astype(np.float64), cluster[found])


def compare(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Comparison:
    """a against b, pair by pair. NaN is a missing reward."""
    found = np.isfinite(a) & np.isfinite(b)
    count, cluster = int(found.sum()), cluster[found]
    a, b = a[found].astype(np.float64), b[found].astype(np.float64)
    difference = _mean(a - b, cluster)
    std = b.std() if count else np.nan
    sigmas = Estimate(*(value / std if std > 0 else np.nan for value in difference))
    outcomes = (1 + np.sign(a - b)) / 2
    return Comparison(count, len(found) - count, difference, sigmas, _unanimous(_mean(outcomes, cluster), cluster))


def diversity(features: Float[np.ndarray, "n d"], cluster: Int[np.ndarray, " n"]) -> Diversity:
    """Mean 1 - cos over pairs of pictures. features: of length 1."""
    return Diversity(*(_centred(*values) for values in _distances(features, cluster)))


def compare_diversity(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"], cluster: Int[np.ndarray, " n"]
) -> Diversity:
    """By how much a is more diverse than b, at the same prompts and noise."""
    pairs = zip(_distances(a, cluster), _distances(b, cluster), strict=True)
    return Diversity(*(_centred(own - other, clusters, scale) for (own, clusters, scale), (other, _, _) in pairs))


def _mean(values: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> Estimate:
    """The mean with its percentile interval. One picture alone says nothing of how sure it is."""
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    if len(values) == 1:
        return Estimate(float(values[0]), np.nan, np.nan)
    if (values == values[0]).all():  # to the last bit, so that a model against itself is at 0 and at 1/2
        return Estimate(*[float(values[0])] * 3)
    members = _members(cluster)
    sums, sizes = np.bincount(members, values), np.bincount(members)
    drawn = _resampled(len(sizes), lambda times: (times @ sums) / (times @ sizes))
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def _resampled(num_clusters: int, statistic: Callable) -> Float[np.ndarray, " r"]:
    """The statistic of NUM_RESAMPLES draws. statistic: how often each cluster was drawn (r, clusters) -> (r,)."""
    rng = np.random.default_rng(SEED)
    share = np.full(num_clusters, 1 / num_clusters)
    rows = max(1, BLOCK // num_clusters)
    sizes = [min(rows, NUM_RESAMPLES - first) for first in range(0, NUM_RESAMPLES, rows)]
    return np.concatenate([statistic(rng.multinomial(num_clusters, share, size=size)) for size in sizes])


def _members(cluster: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Clusters numbered from 0; where there is one alone, each picture is its own."""
    distinct, members = np.unique(cluster, return_inverse=True)
    return np.arange(len(cluster)) if len(distinct) == 1 else members


def _unanimous(rate: Estimate, cluster: Int[np.ndarray, " n"]) -> Estimate:
    """The win rate; where one side won every time, with the exact binomial bound (Clopper & Pearson 1934).

    A bootstrap sees no variation there, and would be certain of a rate of 1 after two wins.
    """
    if rate.value not in (0.0, 1.0):
        return rate
    bound = ((1 - COVERAGE) / 2) ** (1 / (_members(cluster).max() + 1))
    return Estimate(1.0, float(bound), 1.0) if rate.value == 1 else Estimate(0.0, 0.0, float(1 - bound))


def _distances(
    features: Float[np.ndarray, "n d"], cluster: Int[np.ndarray, " n"]
) -> list[tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"], float]]:
    """(values, their clusters, scale) of the overall and of the within-prompt diversity, each the mean of its values.

    Overall a value is a picture's mean distance to all others. Each pair is in two of them, so that the mean varies by
    twice what such values would alone (Hájek's projection of a U-statistic): the scale of its interval.
    """
    features, members = features.astype(np.float64), np.unique(cluster, return_inverse=True)[1]
    overall, within, clusters = np.zeros(0), [], []
    if len(features) > 1:
        overall = 1 - (features @ features.sum(axis=0) - (features**2).sum(axis=1)) / (len(features) - 1)
    for k in range(members.max() + 1 if len(members) else 0):
        own = features[members == k]
        if len(own) > 1:
            total = (own.sum(axis=0) ** 2).sum() - (own**2).sum()
            within.append(1 - total / (len(own) * (len(own) - 1)))
            clusters.append(k)
    return [(overall, members[: len(overall)], 2.0), (np.array(within), np.array(clusters, int), 1.0)]


def _centred(values: Float[np.ndarray, " m"], cluster: Int[np.ndarray, " m"], scale: float) -> Estimate:
    """The mean of the values, with its interval `scale` times as wide."""
    found = _mean(values, cluster)
    return Estimate(found.value, *(found.value + scale * (bound - found.value) for bound in found[1:]))
