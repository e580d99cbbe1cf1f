"""Which denoising steps of a round are taken with noise: all, as published, or a window of them.

Only a noisy step has a density and can be learned from. With few of them the update has few rows, and each answers for
more of what a picture became (MixGRPO, Li et al. 2025; Flow-GRPO-Fast, Liu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Key

from ddpo_jax.errors import UserError

ANEW = -1  # the first step is drawn in each round
KEY_INDEX = 2**31 - 2  # folded into a round's key; no sample's number reaches it


def make(timesteps: Float[np.ndarray, " states"], *, size: int, start: int, min_timestep: int) -> Callable:
    """The key of a round -> (T,) bool, whether each step is noisy; None where all are, which is a size of 0.

    start: the first step of the window, all of which is learned from; ANEW draws it. Steps that begin below
    `min_timestep` are not learned from.

    Raises:
        UserError: there is no such window.
    """
    num_steps, learned = len(timesteps) - 1, int(np.sum(timesteps[:-1] >= min_timestep))
    if not 0 <= size <= learned:
        raise UserError(
            f"sample.window={size}: expected 0 (off) to {learned}, the steps of sample.num_steps={num_steps} that begin"
            f" at train.min_timestep={min_timestep} or above"
        )
    last = learned - size if size else ANEW
    if not ANEW <= start <= last:
        expected = f"{ANEW} (drawn anew in each round)" + (f" to {last}" if size else "")
        raise UserError(f"sample.window_start={start}: expected {expected}, as sample.window={size} leaves it")
    if size == 0:
        return lambda key: None

    def window(key: Key[Any, ""]) -> Bool[np.ndarray, " T"]:
        first = start
        if start == ANEW:
            first = int(jax.random.randint(jax.random.fold_in(key, KEY_INDEX), (), 0, last + 1))
        step = np.arange(num_steps)
        return (first <= step) & (step < first + size)

    return window
