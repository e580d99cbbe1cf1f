"""Blocks that several networks share. NHWC; submodules bear diffusers' own names, as convert.py expects."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ddpo_jax.errors import UserError

Dtype = DTypeLike

# How attention is computed: by XLA with all products of queries and keys at once, the same for some queries at a time,
# or by cuDNN's fused kernel.
KERNELS = ("xla", "chunked", "cudnn")
CUDNN_WIDTH = 128  # of a head, at most, and a multiple of 8
CHUNK_PRODUCTS = 2**23  # of one sample's queries and keys in all heads that are held at a time


def activation(name: str):
    """The activation function of a `hidden_act` or `act_fn` field."""
    return {
        "silu": nn.silu,
        "swish": nn.silu,
        "gelu": lambda x: nn.gelu(x, approximate=False),
        "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    }[name]


def group_norm(num_groups: int, epsilon: float, dtype: Dtype, name: str) -> nn.GroupNorm:
    # The two-pass variance: E[x²] - E[x]² loses digits where a group's mean is large.
    return nn.GroupNorm(num_groups=num_groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def layer_norm(epsilon: float, dtype: Dtype | None, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def conv(features: int, size: int, dtype: Dtype, name: str, *, stride: int = 1) -> nn.Conv:
    """A square convolution padded as torch pads it: by size // 2 on every side."""
    return nn.Conv(features, (size, size), strides=stride, padding=size // 2, dtype=dtype, name=name)


def attend(
    query: Float[Array, "b q d"],
    key: Float[Array, "b k d"],
    value: Float[Array, "b k d"],
    *,
    num_heads: int,
    mask: Bool[Array, "#b 1 #q k"] | None = None,
    kernel: str = "xla",
) -> Float[Array, "b q d"]:
    """Multi-head scaled dot-product attention; products of queries and keys, and the softmax, in float32 at least.

    kernel: one of KERNELS; where a head's width does not fit cuDNN's, XLA's all the same.
    """
    width = query.shape[-1] // num_heads
    fits = kernel == "cudnn" and width % 8 == 0 and width <= CUDNN_WIDTH

    def split(x):
        return x.reshape(*x.shape[:-1], num_heads, width)

    if query.dtype == jnp.float64:
        attention = _attention_float64
    elif kernel == "chunked" and mask is None:
        attention = _attention_chunked
    else:
        attention = partial(jax.nn.dot_product_attention, implementation="cudnn" if fits else "xla")
    return attention(split(query), split(key), split(value), mask=mask).reshape(query.shape)


def _attention_chunked(
    query: Float[Array, "b q n e"], key: Float[Array, "b k n e"], value: Float[Array, "b k n e"], *, mask: None
) -> Float[Array, "b q n e"]:
    """The same, a chunk of queries after the other; each is computed again for its gradient (Rabe & Staats 2021)."""
    length, heads = query.shape[1:3]
    most = max(1, CHUNK_PRODUCTS // (heads * key.shape[1]))
    size = max(size for size in range(1, min(most, length) + 1) if length % size == 0)
    # Their gradients are sums over the chunks: in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def attended(some: Float[Array, "b c n e"]) -> Float[Array, "b c n e"]:
        own = (x.astype(query.dtype) for x in wide)
        return jax.nn.dot_product_attention(some, *own, implementation="xla")

    if size == length:
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")
    chunks = jnp.moveaxis(query.reshape(len(query), -1, size, *query.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(attended, chunks), 0, 1).reshape(query.shape)


def choose_kernel(name: str, *, dtype: Dtype) -> str:
    """The kernel of the denoiser's attention: `name`, or for "auto" the best that this machine and dtype have.

    Raises:
        UserError: it is none of them, or cannot be had here.
    """
    if name not in ("auto", *KERNELS):
        raise UserError(f"attention={name!r}: expected 'auto', {', '.join(map(repr, KERNELS))}")
    platform = jax.default_backend()
    fused = platform == "gpu" and jnp.dtype(dtype).itemsize == 2
    if name == "cudnn" and not fused:
        raise UserError(
            f"attention='cudnn' in {jnp.dtype(dtype).name} on {platform}: expected an NVIDIA GPU and"
            " compute_dtype=bfloat16; set 'auto'"
        )
    if name != "auto":
        return name
    return "cudnn" if fused else "xla" if platform == "cpu" else "chunked"


def _attention_float64(
    query: Float[Array, "b q n e"],
    key: Float[Array, "b k n e"],
    value: Float[Array, "b k n e"],
    *,
    mask: Bool[Array, "#b 1 #q k"] | None,
) -> Float[Array, "b q n e"]:
    """The same; jax.nn.dot_product_attention rounds its softmax to float32 whatever it is given."""
    products = jnp.einsum("bqne,bkne->bnqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        products = jnp.where(mask, products, -jnp.inf)
    return jnp.einsum("bnqk,bkne->bqne", jax.nn.softmax(products), value)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a residual, conditioned on the time embedding if there is one."""

    features: int
    num_groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time_embedding: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w f"]:
        hidden = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm1")(x))
        hidden = conv(self.features, 3, self.dtype, "conv1")(hidden)
        if time_embedding is not None:
            shift = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time_embedding))
            hidden = hidden + shift[:, None, None, :]
        hidden = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm2")(hidden))
        hidden = conv(self.features, 3, self.dtype, "conv2")(hidden)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.dtype, "conv_shortcut")(x)
        return x + hidden


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv(x.shape[-1], 3, self.dtype, "conv")(x)


class Attention(nn.Module):
    """Self- or cross-attention of a UNet transformer block."""

    num_heads: int
    dtype: Dtype = jnp.float32
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"], context: Float[Array, "b k e"] | None = None) -> Float[Array, "b q d"]:
        context = x if context is None else context
        width = x.shape[-1]
        query = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_q")(x)
        key = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_k")(context)
        value = nn.Dense(width, use_bias=False, dtype=self.dtype, name="to_v")(context)
        out = attend(query, key, value, num_heads=self.num_heads, kernel=self.kernel)
        return nn.Dense(width, dtype=self.dtype, name="to_out_0")(out)


class GatedLinearUnit(nn.Module):
    """GEGLU: half of a projection gates the other half through an exact GELU (Shazeer 2020)."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"]) -> Float[Array, "b q f"]:
        hidden, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
        hidden = GatedLinearUnit(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised first."""

    num_heads: int
    dtype: Dtype = jnp.float32
    kernel: str = "xla"  # of attention

    @nn.compact
    def __call__(self, x: Float[Array, "b q d"], context: Float[Array, "b k e"]) -> Float[Array, "b q d"]:
        def attention(name: str) -> Attention:
            return Attention(self.num_heads, self.dtype, self.kernel, name=name)

        x = x + attention("attn1")(layer_norm(1e-5, self.dtype, "norm1")(x))
        x = x + attention("attn2")(layer_norm(1e-5, self.dtype, "norm2")(x), context)
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
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b s d"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock

        def project(name: str):
            if self.linear_projection:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return conv(channels, 1, self.dtype, name)

        hidden = project("proj_in")(group_norm(self.num_groups, 1e-6, self.dtype, "norm")(x))
        hidden = hidden.reshape(batch, height * width, channels)
        for i in range(self.num_blocks):
            hidden = block(self.num_heads, self.dtype, self.kernel, name=f"transformer_blocks_{i}")(hidden, context)
        return x + project("proj_out")(hidden.reshape(x.shape))
