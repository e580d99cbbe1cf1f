"""The denoiser: diffusers' UNet2DConditionModel in the configuration space of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.models import winograd
from ddpo_jax.models.kernels import Kernels
from ddpo_jax.models.layers import (
    Dtype,
    ResnetBlock,
    SpatialTransformer,
    Upsample,
    add,
    conv,
    dense,
    in_turn,
    same_rows,
)
from ddpo_jax.models.norms import group_norm
from ddpo_jax.models.unet_config import UNetConfig

# What the backward pass keeps of the forward pass, from everything to next to nothing; the rest is computed again.
REMAT = ("none", "products", "blocks", "full")


def timestep_embedding(
    t: Float[Array, " b"], size: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b e"]:
    """Sinusoidal features of the timestep, in float32 (Vaswani et al. 2017, in Ho et al. 2020's arrangement)."""
    half = size // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimestepMLP(nn.Module):
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b f"]:
        x = nn.silu(dense(self.features, self.dtype, "linear_1")(x))
        return dense(self.features, self.dtype, "linear_2")(x)


class Downsample(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return conv(x.shape[-1], 3, self.dtype, "conv", stride=2)(x)


class BlockConfig(NamedTuple):
    """What the layers of one block share."""

    features: int
    num_layers: int
    num_heads: int
    num_transformer_blocks: int
    attends: bool
    linear_projection: bool
    num_groups: int
    epsilon: float
    remat: bool  # recompute each layer in the backward pass
    kernels: Kernels


def _resnet(config: BlockConfig, dtype: Dtype, i: int) -> nn.Module:
    kind = nn.remat(ResnetBlock) if config.remat else ResnetBlock
    return kind(
        config.features, config.num_groups, config.epsilon, dtype, config.kernels.convolution, name=f"resnets_{i}"
    )


def _transformer(config: BlockConfig, dtype: Dtype, i: int) -> nn.Module:
    return SpatialTransformer(
        config.num_heads,
        config.num_groups,
        config.num_transformer_blocks,
        config.linear_projection,
        dtype,
        config.remat,
        config.kernels.attention,
        name=f"attentions_{i}",
    )


class DownBlock(nn.Module):
    """Residual blocks (each followed by attention where it attends), then halving; returns every map for the skips."""

    config: BlockConfig
    downsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time_embedding, contexts):
        config, skips = self.config, []
        for i in range(config.num_layers):
            x = _resnet(config, self.dtype, i)(x, time_embedding)
            if config.attends:
                x = _transformer(config, self.dtype, i)(x, contexts)
            skips.append(x)
        if self.downsample:
            x = Downsample(self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    config: BlockConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time_embedding, contexts):
        x = _resnet(self.config, self.dtype, 0)(x, time_embedding)
        x = _transformer(self.config, self.dtype, 0)(x, contexts)
        return _resnet(self.config, self.dtype, 1)(x, time_embedding)


class UpBlock(nn.Module):
    """The mirror of DownBlock: each residual block first takes one skip."""

    config: BlockConfig
    upsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, skips, time_embedding, contexts):
        config = self.config
        for i in range(config.num_layers):
            x = jnp.concatenate(same_rows(x, skips[-1 - i]), axis=-1)
            x = _resnet(config, self.dtype, i)(x, time_embedding)
            if config.attends:
                x = _transformer(config, self.dtype, i)(x, contexts)
        return Upsample(self.dtype, config.kernels.convolution, name="upsamplers_0")(x) if self.upsample else x


def _several(condition: Float[Array, "b ..."] | tuple[Float[Array, "_ ..."], ...]) -> tuple[Float[Array, "_ ..."], ...]:
    return condition if isinstance(condition, tuple) else (condition,)


_is_named = jax.checkpoint_policies.save_only_these_names(winograd.KEPT)


def _keep_products(prim, *inputs, **params) -> bool:
    """Whether the outputs of a convolution, or of a product with a weight, are kept: what costs most to compute again.

    Products with a batch dimension are attention's: their outputs are its largest. Nor is a GEGLU's first, which is
    eight times as wide as its input: all of them are over a third of what would be kept of Stable Diffusion 1.5, and
    an eighth of its forward pass.
    """
    if prim is jax.lax.conv_general_dilated_p or _is_named(prim, *inputs, **params):
        return True
    if prim is not jax.lax.dot_general_p or any(params["dimension_numbers"][1]):
        return False
    kernel = inputs[1].shape
    return kernel[-1] < 8 * kernel[0]


class UNet2DConditionModel(nn.Module):
    """ε or v predicted from a noisy latent, its timestep and the text (Rombach et al. 2022; Podell et al. 2023)."""

    config: UNetConfig
    dtype: Dtype = jnp.float32
    # Of each block the backward pass keeps all ("none"), the outputs of its products with weights ("products") or its
    # inputs alone ("blocks"); "full" computes the layers inside a block one by one too, a second time.
    remat: str = "none"
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b s d"] | tuple[Float[Array, "_ s d"], ...],
        pooled: Float[Array, "b p"] | tuple[Float[Array, "_ p"], ...] | None = None,
        time_ids: Float[Array, "b 6"] | tuple[Float[Array, "_ 6"], ...] | None = None,
    ) -> Float[Array, "B h w c"]:
        """`pooled` and `time_ids` are read where the configuration is text_time's.

        n predictions for each row of x_t, one after another, come of tuples of n conditions; those of one row are
        every row's, but not all of them. What does not depend on the condition is computed once.
        """
        config, dtype = self.config, self.dtype
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        x, contexts = x_t.astype(dtype), tuple(context.astype(dtype) for context in _several(context))
        down_block, mid_block, up_block = (self._remat(block) for block in (DownBlock, MidBlock, UpBlock))

        def block_config(i: int, *, num_layers: int, attends: bool) -> BlockConfig:
            return BlockConfig(
                features=channels[i],
                num_layers=num_layers,
                num_heads=config.num_heads[i],
                num_transformer_blocks=config.num_transformer_blocks[i],
                attends=attends,
                linear_projection=config.linear_projection,
                num_groups=config.num_groups,
                epsilon=config.epsilon,
                remat=self.remat == "full",
                kernels=self.kernels,
            )

        time_embedding = TimestepMLP(4 * channels[0], dtype, name="time_embedding")(
            self._sinusoids(t, channels[0]).astype(dtype)
        )
        if config.time_id_size is not None:
            pooled, time_ids = in_turn(_several(pooled)), in_turn(_several(time_ids))
            ids = self._sinusoids(time_ids.reshape(-1), config.time_id_size).reshape(time_ids.shape[0], -1)
            added = jnp.concatenate([pooled.astype(jnp.float32), ids], axis=-1).astype(dtype)
            time_embedding = add(time_embedding, TimestepMLP(4 * channels[0], dtype, name="add_embedding")(added))

        x = conv(channels[0], 3, dtype, "conv_in")(x)
        skips = [x]
        for i, attends in enumerate(config.down_attends):
            block = block_config(i, num_layers=config.layers_per_block[i], attends=attends)
            x, new = down_block(block, i < last, dtype, name=f"down_blocks_{i}")(x, time_embedding, contexts)
            skips += new
        block = block_config(last, num_layers=1, attends=True)
        x = mid_block(block, dtype, name="mid_block")(x, time_embedding, contexts)
        for i, attends in enumerate(config.up_attends):
            num_layers = config.layers_per_block[last - i] + 1
            skips, taken = skips[:-num_layers], skips[-num_layers:]
            block = block_config(last - i, num_layers=num_layers, attends=attends)
            x = up_block(block, i < last, dtype, name=f"up_blocks_{i}")(x, taken, time_embedding, contexts)
        x = nn.silu(group_norm(config.num_groups, config.epsilon, dtype, "conv_norm_out")(x))
        return conv(config.out_channels, 3, dtype, "conv_out")(x)

    def _sinusoids(self, values: Float[Array, " n"], size: int) -> Float[Array, "n e"]:
        config = self.config
        return timestep_embedding(values, size, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)

    def _remat(self, block: type[nn.Module]) -> type[nn.Module]:
        match self.remat:
            case "none":
                return block
            case "products":
                return nn.remat(block, policy=_keep_products)
            case _:
                return nn.remat(block)
