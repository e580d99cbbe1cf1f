"""Multi-head attention, by the kernel that suits the machine."""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ddpo_jax.errors import UserError

# How attention is computed. By XLA with all products of queries and keys at once; the same, but each step by itself,
# as XLA on CPU would compute the products once for each of what it fuses them with; for some queries at a time; or by
# cuDNN's fused kernel.
KERNELS = ("xla", "stepwise", "chunked", "cudnn")
CUDNN_WIDTH = 128  # of a head, at most, and a multiple of 8
CHUNK_PRODUCTS = 2**23  # of one sample's queries and keys in all heads that are held at a time


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

    def split(x):
        return x.reshape(*x.shape[:-1], num_heads, width)

    if query.dtype == jnp.float64:
        attention = _float64
    elif mask is not None:
        attention = _xla
    elif kernel == "cudnn" and width % 8 == 0 and width <= CUDNN_WIDTH:
        attention = _cudnn
    else:
        attention = {"stepwise": _stepwise, "chunked": _chunked}.get(kernel, _xla)
    return attention(split(query), split(key), split(value), mask=mask).reshape(query.shape)


def _chunked(
    query: Float[Array, "b q n e"], key: Float[Array, "b k n e"], value: Float[Array, "b k n e"], mask: None = None
) -> Float[Array, "b q n e"]:
    """The same, a chunk of queries after the other; each is computed again for its gradient (Rabe & Staats 2021)."""
    length, heads = query.shape[1:3]
    most = max(1, CHUNK_PRODUCTS // (heads * key.shape[1]))
    size = max(size for size in range(1, min(most, length) + 1) if length % size == 0)
    # Their gradients are sums over the chunks: in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)

    @jax.checkpoint
    def attended(some: Float[Array, "b c n e"]) -> Float[Array, "b c n e"]:
        return _xla(some, *(x.astype(query.dtype) for x in wide))

    if size == length:
        return _xla(query, key, value)
    chunks = jnp.moveaxis(query.reshape(len(query), -1, size, *query.shape[2:]), 1, 0)
    return jnp.moveaxis(jax.lax.map(attended, chunks), 0, 1).reshape(query.shape)


def choose_kernel(name: str, *, dtype: DTypeLike) -> str:
    """The kernel of the denoiser's attention: `name`, or for "auto" the best that this machine and dtype have.

    Raises:
        UserError: it is none of them, or cannot be had here.
    """
    if name not in ("auto", *KERNELS):
        raise UserError(f"attention={name!r}: expected 'auto', {', '.join(map(repr, KERNELS))}")
    platform = jax.default_backend()
    if name not in ("auto", "cudnn"):
        return name
    fault = _cudnn_fault(platform, jnp.dtype(dtype).name)
    if name == "cudnn" and fault:
        raise UserError(f"attention='cudnn' in {jnp.dtype(dtype).name} on {platform}: {fault}; set 'auto'")
    return "cudnn" if not fault else "stepwise" if platform == "cpu" else "chunked"


@functools.cache
def _cudnn_fault(platform: str, dtype: str) -> str:
    """Why cuDNN's kernel cannot be had, by compiling a small one with its gradient; empty if it can."""
    if platform != "gpu" or jnp.dtype(dtype).itemsize != 2:
        return "expected an NVIDIA GPU and compute_dtype=bfloat16"
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), dtype)

    def total(x: Float[Array, "b q n e"]) -> Float[Array, ""]:
        return _cudnn(x, x, x).sum(dtype=jnp.float32)

    try:
        jax.jit(jax.grad(total)).lower(x).compile()
    except Exception as error:  # an old GPU, another maker's, or no cuDNN: each with an error of its own
        return f"it cannot be had here ({str(error).splitlines()[0]})"
    return ""


_cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
_xla = partial(jax.nn.dot_product_attention, implementation="xla")


def _stepwise(
    query: Float[Array, "b q n e"], key: Float[Array, "b k n e"], value: Float[Array, "b k n e"], mask: None = None
) -> Float[Array, "b q n e"]:
    """The same; nothing is fused with a product."""
    alone, wide = jax.lax.optimization_barrier, jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (alone(x.swapaxes(1, 2)) for x in (query / query.shape[-1] ** 0.5, key, value))
    products = alone(jnp.einsum("bnqe,bnke->bnqk", query, key, preferred_element_type=wide))
    shares = alone(jax.nn.softmax(products).astype(value.dtype))
    return jnp.einsum("bnqk,bnke->bnqe", shares, value).swapaxes(1, 2)


def _float64(
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
