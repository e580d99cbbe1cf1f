"""Training methods by name: one file a method, one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpo_jax.algorithms import ddpo, diffusion_dpo, reward_backprop, rwr, sft
from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.process import choose
from ddpo_jax.types import Algorithm

ALGORITHMS = {
    "ddpo_is": ddpo.importance_sampling,
    "ddpo_sf": ddpo.score_function,
    "rwr": rwr.rwr,
    "sparse_rwr": rwr.rwr,
    "sft": sft.sft,
    "diffusion_dpo": diffusion_dpo.offline,
    "online_dpo": diffusion_dpo.online,
    "reward_backprop": reward_backprop.reward_backprop,
}


def make(name: str, parts: Parts, settings: Mapping[str, Any]) -> Algorithm:
    """The named method with its settings.

    Raises:
        UserError: there is no such method.
    """
    return choose(ALGORITHMS, name, "algorithm")(parts, **settings)
