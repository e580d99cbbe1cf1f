"""From settings to an optax.GradientTransformation."""

from __future__ import annotations

import optax

from ddpo_jax.errors import UserError


def adamw(
    *,
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    num_warmup_steps: int,
    num_decay_steps: int,
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with a skipped step for every gradient that is not finite.

    The rate warms up linearly, then is constant, or decays along a cosine to 0 if num_decay_steps > 0 (counted from
    the first step, warm-up included).

    Raises:
        UserError: a setting is out of range.
    """
    for name, value in (("learning_rate", learning_rate), ("max_grad_norm", max_grad_norm)):
        if not value > 0:
            raise UserError(f"train.{name}={value}: expected a positive number")
    for name, value in (("adam_beta1", b1), ("adam_beta2", b2)):
        if not 0 <= value < 1:
            raise UserError(f"train.{name}={value}: expected 0 or more, below 1")
    if num_warmup_steps < 0:
        raise UserError(f"train.num_warmup_steps={num_warmup_steps}: expected 0 (no warm-up) or more")
    if num_decay_steps and num_decay_steps <= num_warmup_steps:
        raise UserError(
            f"train.num_decay_steps={num_decay_steps}: expected 0 (constant) or more than"
            f" num_warmup_steps={num_warmup_steps}, which it includes"
        )
    if num_decay_steps:
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_warmup_steps, num_decay_steps)
    elif num_warmup_steps:
        rate = optax.linear_schedule(0.0, learning_rate, num_warmup_steps)
    else:
        rate = learning_rate
    tx = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
    # optax would apply a non-finite update after this many in a row; the run is stopped long before.
    return optax.apply_if_finite(tx, max_consecutive_errors=1_000_000)
