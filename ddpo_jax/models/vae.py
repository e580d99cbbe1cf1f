"""The autoencoder between pixels and latents: diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.errors import UserError, number, numbers
from ddpo_jax.models.attention import attend
from ddpo_jax.models.layers import Dtype, ResnetBlock, Upsample, conv, dense
from ddpo_jax.models.norms import group_norm

EPSILON = 1e-6  # of every GroupNorm in diffusers' autoencoder; not in its config

FIXED = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "out_channels": (3,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}


class VAEConfig(NamedTuple):
    """What vae/config.json says."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    num_groups: int
    scaling_factor: float
    force_upcast: bool  # compute in float32 whatever the rest computes in: in float16 XL's activations overflow

    @property
    def reduction(self) -> int:
        """Pixels a latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def vae_config(fields: Mapping[str, Any]) -> VAEConfig:
    """The VAEConfig of a parsed vae/config.json.

    Raises:
        UserError: a field asks for a network that this one is not.
    """
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    channels = numbers(fields, "block_out_channels")
    for field, kind in kinds.items():
        if list(fields[field]) != [kind] * len(channels):
            raise UserError(f"{field}={fields[field]!r} is not supported; expected {kind!r} for each width")
    for field, allowed in FIXED.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise UserError(f"{field}={fields[field]!r} is not supported; expected {allowed[0]!r}")
    config = VAEConfig(
        block_out_channels=channels,
        layers_per_block=number(fields, "layers_per_block", 1),
        latent_channels=number(fields, "latent_channels"),
        num_groups=number(fields, "norm_num_groups", 32),
        scaling_factor=number(fields, "scaling_factor", 0.18215, kind=float),
        force_upcast=bool(fields.get("force_upcast", False)),
    )
    if any(width % config.num_groups for width in config.block_out_channels):
        raise UserError(
            f"block_out_channels={list(config.block_out_channels)} must be divisible by"
            f" norm_num_groups={config.num_groups}"
        )
    return config


class SpatialAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, around a residual."""

    num_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        hidden = group_norm(self.num_groups, EPSILON, self.dtype, "group_norm")(x)
        hidden = hidden.reshape(batch, height * width, channels)
        query, key, value = (dense(channels, self.dtype, name)(hidden) for name in ("to_q", "to_k", "to_v"))
        out = attend(query, key, value, num_heads=1)
        return x + dense(channels, self.dtype, "to_out_0")(out).reshape(x.shape)


class MidBlock(nn.Module):
    features: int
    num_groups: int
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = ResnetBlock(self.features, self.num_groups, EPSILON, self.dtype, self.convolution, name="resnets_0")(x)
        x = SpatialAttention(self.num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.features, self.num_groups, EPSILON, self.dtype, self.convolution, name="resnets_1")(x)


class Downsample(nn.Module):
    """A strided convolution padded on the far sides only, as the encoder was trained."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        padding = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class DownEncoderBlock(nn.Module):
    features: int
    num_layers: int
    num_groups: int
    downsample: bool
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.num_groups, EPSILON, self.dtype, self.convolution, name=f"resnets_{i}")(
                x
            )
        return Downsample(self.dtype, name="downsamplers_0")(x) if self.downsample else x


class UpDecoderBlock(nn.Module):
    features: int
    num_layers: int
    num_groups: int
    upsample: bool
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.num_groups, EPSILON, self.dtype, self.convolution, name=f"resnets_{i}")(
                x
            )
        return Upsample(self.dtype, self.convolution, name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    config: VAEConfig
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        config, channels = self.config, self.config.block_out_channels
        x = conv(channels[0], 3, self.dtype, "conv_in")(x)
        for i, width in enumerate(channels):
            x = DownEncoderBlock(
                width,
                config.layers_per_block,
                config.num_groups,
                i < len(channels) - 1,
                self.dtype,
                self.convolution,
                name=f"down_blocks_{i}",
            )(x)
        x = MidBlock(channels[-1], config.num_groups, self.dtype, self.convolution, name="mid_block")(x)
        x = nn.silu(group_norm(config.num_groups, EPSILON, self.dtype, "conv_norm_out")(x))
        return conv(2 * config.latent_channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        config, channels = self.config, self.config.block_out_channels[::-1]
        x = conv(channels[0], 3, self.dtype, "conv_in")(x)
        x = MidBlock(channels[0], config.num_groups, self.dtype, self.convolution, name="mid_block")(x)
        for i, width in enumerate(channels):
            x = UpDecoderBlock(
                width,
                config.layers_per_block + 1,
                config.num_groups,
                i < len(channels) - 1,
                self.dtype,
                self.convolution,
                name=f"up_blocks_{i}",
            )(x)
        x = nn.silu(group_norm(config.num_groups, EPSILON, self.dtype, "conv_norm_out")(x))
        return conv(3, 3, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """A diagonal-Gaussian autoencoder (Kingma & Welling 2014; Rombach et al. 2022). Pixels here are in [-1, 1]."""

    config: VAEConfig
    dtype: Dtype = jnp.float32
    convolution: str = "direct"

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype, self.convolution)
        self.decoder = Decoder(self.config, self.dtype, self.convolution)
        self.quant_conv = nn.Conv(2 * self.config.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.config.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, x: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the unscaled latent, in float32."""
        moments = self.quant_conv(self.encoder(x.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Pixels of an unscaled latent, in float32."""
        return self.decoder(self.post_quant_conv(latent.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        mean, _ = self.encode(x)
        return self.decode(mean)
