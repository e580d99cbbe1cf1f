"""The denoiser: diffusers' UNet2DConditionModel in the configuration space of Stable Diffusion 1.x."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.errors import UserError
from ddpo_jax.models.layers import Dtype, ResnetBlock, SpatialTransformer, Upsample, conv, group_norm

DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # block type -> whether it attends to the text
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Fields of unet/config.json that change the network, with the only value that this network has.
FIXED = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (False,),
    "use_linear_projection": (False,),
}


class UNetConfig(NamedTuple):
    """What unet/config.json says, one entry a block where a field is a tuple."""

    in_channels: int
    out_channels: int
    latent_size: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    num_heads: tuple[int, ...]
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    cross_attention_dim: int
    num_groups: int
    epsilon: float
    flip_sin_to_cos: bool
    freq_shift: float


def unet_config(fields: Mapping[str, Any]) -> UNetConfig:
    """The UNetConfig of a parsed unet/config.json.

    Raises:
        UserError: a field asks for a network that this one is not.
    """
    for field, allowed in FIXED.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise UserError(
                f"unet/config.json: {field}={fields[field]!r} is not supported; expected {allowed[0]!r}"
                " (the Stable Diffusion 1.x family)"
            )
    channels = tuple(fields["block_out_channels"])
    # diffusers' quirk: SD 1.x writes the *number* of heads under attention_head_dim.
    heads = fields.get("num_attention_heads") or fields.get("attention_head_dim", 8)
    try:
        down = tuple(DOWN[kind] for kind in fields["down_block_types"])
        up = tuple(UP[kind] for kind in fields["up_block_types"])
    except KeyError as error:
        raise UserError(f"unet/config.json: block type {error} is not one of {[*DOWN, *UP]}") from None
    for field, kinds in (("down_block_types", down), ("up_block_types", up)):
        if len(kinds) != len(channels):
            raise UserError(
                f"unet/config.json: {field} has {len(kinds)} entries; expected {len(channels)}, one a block"
            )
    if not isinstance(fields["sample_size"], int):
        raise UserError(
            f"unet/config.json: sample_size={fields['sample_size']!r}; expected the side of a square latent"
        )
    config = UNetConfig(
        in_channels=fields["in_channels"],
        out_channels=fields["out_channels"],
        latent_size=fields["sample_size"],
        block_out_channels=channels,
        layers_per_block=_each(fields.get("layers_per_block", 2), len(channels)),
        num_heads=_each(heads, len(channels)),
        down_attends=down,
        up_attends=up,
        cross_attention_dim=fields["cross_attention_dim"],
        num_groups=fields.get("norm_num_groups", 32),
        epsilon=fields.get("norm_eps", 1e-5),
        flip_sin_to_cos=fields.get("flip_sin_to_cos", True),
        freq_shift=float(fields.get("freq_shift", 0)),
    )
    for i, (width, count) in enumerate(zip(channels, config.num_heads, strict=True)):
        if width % config.num_groups or (width % count and (down[i] or up[-1 - i])):
            raise UserError(
                f"unet/config.json: block_out_channels[{i}]={width} must be divisible by norm_num_groups="
                f"{config.num_groups} and by the number of heads {count}"
            )
    return config


def _each(value: int | list[int], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise UserError(f"unet/config.json: {list(values)} has {len(values)} entries; expected {count}, one a block")
    return values


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
        x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class Downsample(nn.Module):
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return conv(x.shape[-1], 3, self.dtype, "conv", stride=2)(x)


class DownBlock(nn.Module):
    """Residual blocks (each followed by attention where it attends), then halving; returns every map for the skips."""

    features: int
    num_layers: int
    num_heads: int
    attends: bool
    downsample: bool
    config: UNetConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time_embedding, context):
        config, skips = self.config, []
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, config.num_groups, config.epsilon, self.dtype, name=f"resnets_{i}")(
                x, time_embedding
            )
            if self.attends:
                x = SpatialTransformer(self.num_heads, config.num_groups, dtype=self.dtype, name=f"attentions_{i}")(
                    x, context
                )
            skips.append(x)
        if self.downsample:
            x = Downsample(self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    features: int
    num_heads: int
    config: UNetConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time_embedding, context):
        groups, epsilon = self.config.num_groups, self.config.epsilon
        x = ResnetBlock(self.features, groups, epsilon, self.dtype, name="resnets_0")(x, time_embedding)
        x = SpatialTransformer(self.num_heads, groups, dtype=self.dtype, name="attentions_0")(x, context)
        return ResnetBlock(self.features, groups, epsilon, self.dtype, name="resnets_1")(x, time_embedding)


class UpBlock(nn.Module):
    """The mirror of DownBlock: each residual block first takes one skip."""

    features: int
    num_layers: int
    num_heads: int
    attends: bool
    upsample: bool
    config: UNetConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, skips, time_embedding, context):
        config = self.config
        for i in range(self.num_layers):
            x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = ResnetBlock(self.features, config.num_groups, config.epsilon, self.dtype, name=f"resnets_{i}")(
                x, time_embedding
            )
            if self.attends:
                x = SpatialTransformer(self.num_heads, config.num_groups, dtype=self.dtype, name=f"attentions_{i}")(
                    x, context
                )
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.upsample else x


class UNet2DConditionModel(nn.Module):
    """ε or v predicted from a noisy latent, its timestep and the text (Rombach et al. 2022)."""

    config: UNetConfig
    dtype: Dtype = jnp.float32
    remat: bool = False  # recompute each block in the backward pass: a tenth of the memory, a third more work

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        config, dtype = self.config, self.dtype
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        x, context = x_t.astype(dtype), context.astype(dtype)
        down_block, mid_block, up_block = (
            nn.remat(block) if self.remat else block for block in (DownBlock, MidBlock, UpBlock)
        )

        features = timestep_embedding(
            t, channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        time_embedding = TimestepMLP(4 * channels[0], dtype, name="time_embedding")(features.astype(dtype))

        x = conv(channels[0], 3, dtype, "conv_in")(x)
        skips = [x]
        for i, width in enumerate(channels):
            x, new = down_block(
                width,
                config.layers_per_block[i],
                config.num_heads[i],
                config.down_attends[i],
                i < last,
                config,
                dtype,
                name=f"down_blocks_{i}",
            )(x, time_embedding, context)
            skips += new
        x = mid_block(channels[-1], config.num_heads[-1], config, dtype, name="mid_block")(x, time_embedding, context)
        for i, attends in enumerate(config.up_attends):
            num_layers = config.layers_per_block[last - i] + 1
            skips, taken = skips[:-num_layers], skips[-num_layers:]
            x = up_block(
                channels[last - i],
                num_layers,
                config.num_heads[last - i],
                attends,
                i < last,
                config,
                dtype,
                name=f"up_blocks_{i}",
            )(x, taken, time_embedding, context)
        x = nn.silu(group_norm(config.num_groups, config.epsilon, dtype, "conv_norm_out")(x))
        return conv(config.out_channels, 3, dtype, "conv_out")(x)
