"""Blocks that several networks share. NHWC; submodules bear diffusers' own names, as convert.py expects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.models import winograd
from ddpo_jax.models.attention import attend
from ddpo_jax.models.norms import group_norm, layer_norm

Dtype = DTypeLike


def activation(name: str):
    """The activation function of a `hidden_act` or `act_fn` field."""
    return {
        "silu": nn.silu,
        "swish": nn.silu,
        "gelu": gelu,
        "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    }[name]


def conv(features: int, size: int, dtype: Dtype, name: str, *, stride: int = 1, method: str = "direct") -> nn.Conv:
    """A square convolution padded as torch pads it: by size // 2 on every side. method: one of winograd.METHODS."""
    by = _by_winograd if method == "winograd" and size == 3 and stride == 1 else None
    padding = size // 2
    return nn.Conv(
        features, (size, size), strides=stride, padding=padding, dtype=dtype, name=name, conv_general_dilated=by
    )


def _by_winograd(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"], *as_direct, **named
) -> Float[Array, "..."]:
    if winograd.suits(x, kernel):
        return winograd.convolve(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, *as_direct, **named)


def dense(features: int, dtype: Dtype | None, name: str, *, use_bias: bool = True) -> nn.Dense:
    """A linear layer."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, dot_general=_product_last, name=name)


def _product_last(x: Float[Array, "*b d"], kernel: Float[Array, "d f"], *_, **__) -> Float[Array, "*b f"]:
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def product(x: Float[Array, "n d"], kernel: Float[Array, "d f"]) -> Float[Array, "n f"]:
    """x @ kernel. On CPU its gradient's operands are written out first.

    XLA would fuse what makes them into two products that want them in different orders, and take twice as long.
    """
    return x @ kernel


def _product(x, kernel):
    return x @ kernel, (x, kernel)


def _product_gradient(kept, gradient):
    def gradients(x, kernel, gradient):
        return gradient @ kernel.T, x.T @ gradient

    def apart(*operands):
        return gradients(*jax.lax.optimization_barrier(operands))

    return jax.lax.platform_dependent(*kept, gradient, cpu=apart, default=gradients)


product.defvjp(_product, _product_gradient)


def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x Φ(x) by erf, with Φ in float32 at least.

    1 + erf loses digits below 0. XLA has one formula for erf, where it has two for the erfc of jax.nn.gelu.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * (0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def in_turn(parts: Sequence[Float[Array, "_ ..."]]) -> Float[Array, "B ..."]:
    """The first row of each part, then the second of each; a part of one row has it in every turn."""
    rows = max(len(part) for part in parts)
    stacked = jnp.stack([jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in parts], axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def same_rows(x: Float[Array, "b ..."], y: Float[Array, "B ..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both with as many rows as the longer has: each row of the shorter stands for as many in turn."""
    rows = max(len(x), len(y))
    return tuple(z if len(z) == rows else in_turn([z] * (rows // len(z))) for z in (x, y))


def add(x: Float[Array, "b ..."], y: Float[Array, "B ..."]) -> Float[Array, "..."]:
    x, y = same_rows(x, y)
    return x + y


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a residual, conditioned on the time embedding if there is one."""

    features: int
    num_groups: int
    epsilon: float
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time_embedding: Float[Array, "B e"] | None = None
    ) -> Float[Array, "_ h w f"]:
        hidden = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm1")(x))
        hidden = conv(self.features, 3, self.dtype, "conv1", method=self.convolution)(hidden)
        if time_embedding is not None:
            shift = dense(self.features, self.dtype, "time_emb_proj")(nn.silu(time_embedding))
            hidden, shift = same_rows(hidden, shift)
            hidden = hidden + shift[:, None, None, :]
        hidden = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm2")(hidden))
        hidden = conv(self.features, 3, self.dtype, "conv2", method=self.convolution)(hidden)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return add(x, hidden)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return DoublingConv(x.shape[-1], self.dtype, self.convolution, name="conv")(x)


class DoublingConv(nn.Module):
    """A 3x3 convolution of a map whose every pixel stands for 2x2 equal ones, in 4/9 of its products.

    Of three rows under the kernel two are one row of x. So each of a pixel's four results is a 2x2 convolution of x,
    with sums of the kernel's taps, which a narrow dtype rounds. Measured on CPU alone: half the time. By Winograd's
    filtering it is a quarter of the products.
    """

    features: int
    dtype: Dtype = jnp.float32
    method: str = "direct"  # one of winograd.METHODS

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        batch, height, width, channels = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))

        if self.method == "winograd" and winograd.suits(x, kernel):
            return winograd.convolve_doubled(x, kernel) + bias[None, None, None]

        def convolve(taps: Float[Array, "2 2 c f"], padding: tuple[tuple[int, int], ...]) -> Float[Array, "b h w f"]:
            taps, layout = taps.astype(self.dtype), ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=layout)

        def pairs(taps: Float[Array, "..."], axis: int) -> Iterator[tuple[Float[Array, "..."], tuple[int, int]]]:
            """Of the first and the second of two results along an axis: two taps of three, and what is padded."""
            first, middle, last = jnp.split(taps, 3, axis)
            yield jnp.concatenate([first, middle + last], axis), (1, 0)
            yield jnp.concatenate([first + middle, last], axis), (0, 1)

        wide = kernel.astype(jnp.promote_types(self.dtype, jnp.float32))
        rows = [
            jnp.stack([convolve(taps, (above, beside)) for taps, beside in pairs(row, 1)], axis=3)
            for row, above in pairs(wide, 0)
        ]
        return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.features) + bias[None, None, None]


class Attention(nn.Module):
    """Self- or cross-attention of a UNet transformer block.

    With n contexts a result has n rows for each row of x, one a context in turn; a context of one row is every row's.
    """

    num_heads: int
    dtype: Dtype = jnp.float32
    kernel: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b q d"], contexts: tuple[Float[Array, "_ k e"], ...] | None = None
    ) -> Float[Array, "B q d"]:
        contexts = (x,) if contexts is None else contexts
        width = x.shape[-1]

        def project(name: str) -> Float[Array, "B k d"]:
            layer = dense(width, self.dtype, name, use_bias=False)
            return in_turn([layer(context) for context in contexts])

        query = dense(width, self.dtype, "to_q", use_bias=False)(x)
        query, key = same_rows(query, project("to_k"))
        out = attend(query, key, project("to_v"), num_heads=self.num_heads, kernel=self.kernel)
        return dense(width, self.dtype, "to_out_0")(out)


class GatedLinearUnit(nn.Module):
    """GEGLU: half of a projection gates the other half through an exact GELU (Shazeer 2020)."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"]) -> Float[Array, "b q f"]:
        hidden, gate = jnp.split(dense(2 * self.features, self.dtype, "proj")(x), 2, axis=-1)
        return hidden * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
        hidden = GatedLinearUnit(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return dense(x.shape[-1], self.dtype, "net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised first."""

    num_heads: int
    dtype: Dtype = jnp.float32
    kernel: str = "xla"  # of attention

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"], contexts: tuple[Float[Array, "_ k e"], ...]) -> Float[Array, "B q d"]:
        def attention(name: str) -> Attention:
            return Attention(self.num_heads, self.dtype, self.kernel, name=name)

        x = x + attention("attn1")(layer_norm(1e-5, self.dtype, "norm1")(x))
        x = add(x, attention("attn2")(layer_norm(1e-5, self.dtype, "norm2")(x), contexts))
        return x + FeedForward(self.dtype, name="ff")(layer_norm(1e-5, self.dtype, "norm3")(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, around a residual.

    The projections are 1x1 convolutions in Stable Diffusion 1.x and linear layers after it: one product, two shapes.
    """

    num_heads: int
    num_groups: int
    num_blocks: int = 1
    linear_projection: bool = False
    dtype: Dtype = jnp.float32
    remat: bool = False  # recompute each transformer block in the backward pass
    kernel: str = "xla"  # of attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], contexts: tuple[Float[Array, "_ s d"], ...]
    ) -> Float[Array, "B h w c"]:
        batch, height, width, channels = x.shape
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock

        def project(name: str):
            if self.linear_projection:
                return dense(channels, self.dtype, name)
            return conv(channels, 1, self.dtype, name)

        hidden = project("proj_in")(group_norm(self.num_groups, 1e-6, self.dtype, "norm")(x))
        hidden = hidden.reshape(batch, height * width, channels)
        for i in range(self.num_blocks):
            hidden = block(self.num_heads, self.dtype, self.kernel, name=f"transformer_blocks_{i}")(hidden, contexts)
        return add(x, project("proj_out")(hidden.reshape(-1, height, width, channels)))
