"""From settings to an optax.GradientTransformation."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from ddpo_jax.errors import UserError

MOMENT_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def make(
    name: str,
    *,
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
    moment_dtype: str,
    weight_decay: float,
    max_grad_norm: float,
    num_warmup_steps: int,
    num_decay_steps: int,
) -> optax.GradientTransformation:
    """`adamw` or `adafactor` after clipping by global norm, with a skipped step for each gradient that is not finite.

    Adafactor (Shazeer & Stern 2018) is that of Diffusion-DPO's SDXL run: a learning rate of its own, no first moment
    and no scaling by the parameters. Weight decay is multiplied by the learning rate in both.

    The rate warms up linearly, then is constant, or decays along a cosine to 0 if num_decay_steps > 0 (counted from
    the first step, warm-up included). moment_dtype: of AdamW's first moments.

    Raises:
        UserError: a setting is out of range.
    """
    for setting, value in (("learning_rate", learning_rate), ("max_grad_norm", max_grad_norm)):
        if not value > 0:
            raise UserError(f"train.{setting}={value}: expected a positive number")
    for setting, value in (("adam_beta1", b1), ("adam_beta2", b2)):
        if not 0 <= value < 1:
            raise UserError(f"train.{setting}={value}: expected 0 or more, below 1")
    if moment_dtype not in MOMENT_DTYPES:
        raise UserError(f"train.adam_moment_dtype={moment_dtype!r}: expected one of {', '.join(MOMENT_DTYPES)}")
    rate = _rate(learning_rate, num_warmup_steps, num_decay_steps)
    match name:
        case "adamw":
            mu_dtype = MOMENT_DTYPES[moment_dtype]
            optimizer = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)
        case "adafactor":
            optimizer = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(rate),
            )
        case _:
            raise UserError(f"train.optimizer={name!r}: expected 'adamw' or 'adafactor'")
    tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    # optax would apply a non-finite update after this many in a row; the run is stopped long before.
    return optax.apply_if_finite(tx, max_consecutive_errors=1_000_000)


def _rate(learning_rate: float, num_warmup_steps: int, num_decay_steps: int) -> optax.ScalarOrSchedule:
    if num_warmup_steps < 0:
        raise UserError(f"train.num_warmup_steps={num_warmup_steps}: expected 0 (no warm-up) or more")
    if num_decay_steps and num_decay_steps <= num_warmup_steps:
        raise UserError(
            f"train.num_decay_steps={num_decay_steps}: expected 0 (constant) or more than"
            f" num_warmup_steps={num_warmup_steps}, which it includes"
        )
    if num_decay_steps:
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_warmup_steps, num_decay_steps)
    if num_warmup_steps:
        return optax.linear_schedule(0.0, learning_rate, num_warmup_steps)
    return learning_rate
