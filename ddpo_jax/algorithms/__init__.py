"""Training methods by name: one file a method, one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpo_jax.algorithms import ddpo, sft
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.process import choose
from ddpo_jax.types import Algorithm

ALGORITHMS = {
    "ddpo_is": ddpo.importance_sampling,
    "ddpo_sf": ddpo.score_function,
    "sft": sft.sft,
}


def make(name: str, parts: Parts, settings: Mapping[str, Any]) -> Algorithm:
    """The named method with its settings.

    Raises:
        UserError: there is no such method.
    """
    return choose(ALGORITHMS, name, "algorithm")(parts, **settings)
