"""Supervised fine-tuning: denoising regression on captioned images (Ho et al. 2020; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Key, UInt8

from ddpo_jax.algorithms.parts import Parts
from ddpo_jax.algorithms.regression import Weighted, make_regression
from ddpo_jax.types import Algorithm, Frozen, Prompts, PyTree, Recalled


def sft(parts: Parts, *, make_encoder: Callable, prompt_dropout: float, num_noise_draws: int) -> Algorithm:
    """Denoising regression. Each picture is encoded once a round and regressed on at `num_noise_draws` (t, ε).

    make_encoder: one of `encode`, by what a round's pictures come as: (b, 1, H, W, 3), or Recalled.
    prompt_dropout: the fraction of pictures that train the unconditional branch, for guidance.
    """
    encode = make_encoder(parts, prompt_dropout=prompt_dropout)
    regression = make_regression(parts, num_noise_draws=num_noise_draws)

    def collect(
        trainable: PyTree,
        frozen: Frozen,
        inputs: tuple[UInt8[np.ndarray, "b 1 H W 3"] | Recalled, Prompts],
        carry: PyTree,
        key: Key[Array, ""],
    ) -> tuple[Weighted, PyTree, dict[str, float | int]]:
        pictures, prompts = inputs
        cond, x_0 = encode(frozen, pictures, prompts.tokens, key)
        report = {"captions/cut": float(sum(entry["cut"] for entry in prompts.metadata))}
        return Weighted(cond, x_0[:, 0], np.ones(len(prompts.texts), np.float32)), carry, report

    return Algorithm(
        init=lambda trainable: (),
        collect=collect,
        loss=regression.loss,
        slices=regression.slices,
        recompute=None,
        check=lambda first: None,
        stop=lambda scalars: None,
        reads_reference=False,
    )
