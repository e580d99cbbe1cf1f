"""Group and layer normalisation whose gradients are written out.

Differentiated step by step, a normalisation keeps several arrays of its input's size and makes several passes over
them; written out, it keeps its input, and a mean and a deviation a group. On CPU the embedded model's gradient takes a
tenth less time so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def group_norm(num_groups: int, epsilon: float, dtype: DTypeLike | None, name: str) -> GroupNorm:
    return GroupNorm(num_groups, epsilon, dtype, name=name)


def layer_norm(epsilon: float, dtype: DTypeLike | None, name: str) -> LayerNorm:
    return LayerNorm(epsilon, dtype, name=name)


class GroupNorm(nn.Module):
    """γ (x - mean) / sqrt(var + ε) + β over the pixels and channels of a group (Wu & He 2018)."""

    num_groups: int
    epsilon: float
    dtype: DTypeLike | None = None  # of the result; the statistics are float32 at least

    @nn.compact
    def __call__(self, x: Float[Array, "b *pixels c"]) -> Float[Array, "b *pixels c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        flat = x.reshape(len(x), -1, x.shape[-1])
        return over_groups(_cast(flat, self.dtype), scale, bias, self.num_groups, self.epsilon).reshape(x.shape)


class LayerNorm(nn.Module):
    """γ (x - mean) / sqrt(var + ε) + β over the last axis (Ba et al. 2016)."""

    epsilon: float
    dtype: DTypeLike | None = None  # of the result; the statistics are float32 at least

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return over_last(_cast(x, self.dtype), scale, bias, self.epsilon)


def _cast(x: Float[Array, "..."], dtype: DTypeLike | None) -> Float[Array, "..."]:
    return x if dtype is None else x.astype(dtype)


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def over_groups(
    x: Float[Array, "b p c"], scale: Float[Any, " c"], bias: Float[Any, " c"], num_groups: int, epsilon: float
) -> Float[Array, "b p c"]:
    """Of p pixels; the variance in two passes, as E[x²] - E[x]² loses digits where a group's mean is large."""
    return _over_groups(x, scale, bias, num_groups, epsilon)[0]


def _over_groups(x, scale, bias, num_groups, epsilon):
    wide = _wide(x)
    mean = _of_group(wide.mean(axis=1), num_groups)
    centred = wide - mean[:, None]
    rate = jax.lax.rsqrt(_of_group(jnp.square(centred).mean(axis=1), num_groups) + epsilon)
    out = centred * (rate * scale[None])[:, None] + bias[None, None]
    return out.astype(x.dtype), (x, mean, rate, scale)


def _over_groups_gradient(num_groups, epsilon, kept, gradient):
    x, mean, rate, scale = kept
    gradient, normed = _wide(gradient), (_wide(x) - mean[:, None]) * rate[:, None]
    along, across = gradient.sum(axis=1), (gradient * normed).sum(axis=1)
    level, slope = (_of_group(total * scale[None], num_groups)[:, None] / x.shape[1] for total in (along, across))
    inner = rate[:, None] * (gradient * scale[None, None] - level - normed * slope)
    return inner.astype(x.dtype), across.sum(axis=0).astype(scale.dtype), along.sum(axis=0).astype(scale.dtype)


over_groups.defvjp(_over_groups, _over_groups_gradient)


def _of_group(values: Float[Array, "b c"], num_groups: int) -> Float[Array, "b c"]:
    """The mean over each channel's group, a channel."""
    size = values.shape[-1] // num_groups

    def spread(means):
        return jnp.repeat(means, size, axis=-1)

    def product(means):  # the same for finite means; written out, where XLA would look up each pixel's group in a loop
        of_channels = jnp.repeat(jnp.eye(num_groups, dtype=means.dtype), size, axis=-1)
        return jnp.dot(means, of_channels, precision="highest")

    means = values.reshape(len(values), num_groups, size).mean(axis=-1)
    return jax.lax.platform_dependent(means, cpu=product, default=spread)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def over_last(
    x: Float[Array, "*b d"], scale: Float[Any, " d"], bias: Float[Any, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """Of the last axis, with the variance in two passes."""
    return _over_last(x, scale, bias, epsilon)[0]


def _over_last(x, scale, bias, epsilon):
    wide = _wide(x)
    mean = wide.mean(axis=-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    return ((wide - mean) * rate * _like(scale, x) + _like(bias, x)).astype(x.dtype), (x, mean, rate, scale)


def _over_last_gradient(epsilon, kept, gradient):
    x, mean, rate, scale = kept
    others = tuple(range(x.ndim - 1))
    gradient, normed = _wide(gradient), (_wide(x) - mean) * rate
    scaled = gradient * _like(scale, x)
    level, slope = (total.mean(axis=-1, keepdims=True) for total in (scaled, scaled * normed))
    inner = rate * (scaled - level - normed * slope)
    scales, biases = (gradient * normed).sum(axis=others), gradient.sum(axis=others)
    return inner.astype(x.dtype), scales.astype(scale.dtype), biases.astype(scale.dtype)


over_last.defvjp(_over_last, _over_last_gradient)


def _like(parameter: Float[Any, " d"], x: Float[Array, "*b d"]) -> Float[Any, "..."]:
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)
