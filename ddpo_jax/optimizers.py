"""From settings to an optax.GradientTransformation."""

from __future__ import annotations

import jax
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
    return clip_and_guard(optimizer, max_norm=max_grad_norm)


def clip_and_guard(inner: optax.GradientTransformation, *, max_norm: float) -> optax.GradientTransformation:
    """`inner` on gradients that are scaled down to a global norm, at most.

    Where that norm is not finite, the parameters and the state stay as if there had been no step, and it is counted.
    This is optax's apply_if_finite around its clip_by_global_norm, with one reduction a parameter and not three: an
    optimizer step is hundreds of small kernels, and compiling them is most of what it costs on a small model.
    """

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        grads: optax.Updates, state: optax.ApplyIfFiniteState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)  # one that overflows would scale the step down to 0, and pass for a good one
        scale = jnp.minimum(1.0, max_norm / norm)
        updates, inner_state = inner.update(
            jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state.inner_state, params
        )
        updates = jax.tree.map(lambda update: jnp.where(finite, update, jnp.zeros_like(update)), updates)
        inner_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state)
        missed = (~finite).astype(jnp.int32)
        return updates, optax.ApplyIfFiniteState(
            notfinite_count=(state.notfinite_count + 1) * missed,
            last_finite=finite,
            total_notfinite=state.total_notfinite + missed,
            inner_state=inner_state,
        )

    return optax.GradientTransformation(init, update)


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
