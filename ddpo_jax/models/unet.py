"""The denoiser: diffusers' UNet2DConditionModel in the configuration space of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.errors import UserError, number, numbers
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

DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # block type -> whether it attends to the text
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Fields of unet/config.json that change the network, with the only value that this network has.
FIXED = {
    "act_fn": ("silu",),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),  # what attention_head_dim says; diffusers refuses it
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, True, None),  # in float32 either way
}

ADDITION_EMBED_TYPES = (None, "text_time")
NUM_TIME_IDS = 6  # of text_time: original height and width, top and left of the crop, target height and width

# What the backward pass keeps of the forward pass, from everything to next to nothing; the rest is computed again.
REMAT = ("none", "products", "blocks", "full")


class UNetConfig(NamedTuple):
    """What unet/config.json says, one entry a block where a field is a tuple."""

    in_channels: int
    out_channels: int
    latent_size: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_transformer_blocks: tuple[int, ...]
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    cross_attention_dim: int
    num_groups: int
    epsilon: float
    flip_sin_to_cos: bool
    freq_shift: float
    linear_projection: bool
    time_id_size: int | None  # features of each of text_time's six ids; None: conditioned on the context alone
    added_size: int  # of the pooled text and the ids together


def unet_config(fields: Mapping[str, Any]) -> UNetConfig:
    """The UNetConfig of a parsed unet/config.json.

    Raises:
        UserError: a field asks for a network that this one is not.
    """
    for field, allowed in FIXED.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise UserError(
                f"{field}={fields[field]!r} is not supported; expected {allowed[0]!r}"
                " (Stable Diffusion 1.x, 2.x and XL base)"
            )
    addition = fields.get("addition_embed_type")
    if addition not in ADDITION_EMBED_TYPES:
        raise UserError(f"addition_embed_type={addition!r} is not supported; expected null or 'text_time'")
    channels = numbers(fields, "block_out_channels")
    # diffusers' quirk: SD 1.x writes the *number* of heads under attention_head_dim.
    heads = fields.get("attention_head_dim", 8)
    try:
        down = tuple(DOWN[kind] for kind in fields["down_block_types"])
        up = tuple(UP[kind] for kind in fields["up_block_types"])
    except KeyError as error:
        raise UserError(f"block type {error} is not one of {[*DOWN, *UP]}") from None
    for field, kinds in (("down_block_types", down), ("up_block_types", up)):
        if len(kinds) != len(channels):
            raise UserError(f"{field} has {len(kinds)} entries; expected {len(channels)}, one a block")
    config = UNetConfig(
        in_channels=number(fields, "in_channels"),
        out_channels=number(fields, "out_channels"),
        latent_size=number(fields, "sample_size"),
        block_out_channels=channels,
        layers_per_block=_each(fields.get("layers_per_block", 2), len(channels)),
        num_heads=_each(heads, len(channels)),
        num_transformer_blocks=_each(fields.get("transformer_layers_per_block", 1), len(channels)),
        down_attends=down,
        up_attends=up,
        cross_attention_dim=number(fields, "cross_attention_dim"),
        num_groups=number(fields, "norm_num_groups", 32),
        epsilon=number(fields, "norm_eps", 1e-5, kind=float),
        flip_sin_to_cos=fields.get("flip_sin_to_cos", True),
        freq_shift=float(number(fields, "freq_shift", 0, kind=float, above=-1)),
        linear_projection=fields.get("use_linear_projection", False),
        time_id_size=number(fields, "addition_time_embed_dim") if addition else None,
        added_size=number(fields, "projection_class_embeddings_input_dim") if addition else 0,
    )
    for i, (width, count) in enumerate(zip(channels, config.num_heads, strict=True)):
        attends = down[i] or up[-1 - i] or i == len(channels) - 1
        if width % config.num_groups or (attends and width % count):
            raise UserError(
                f"block_out_channels[{i}]={width} must be divisible by norm_num_groups="
                f"{config.num_groups} and by the number of heads {count}"
            )
    return config


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise UserError(f"{list(values)} has {len(values)} entries; expected {count}, one a block")
    if not all(isinstance(entry, int) and entry > 0 for entry in values):
        raise UserError(f"{list(values)}: expected one positive whole number a block")
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
    kernel: str  # of attention


def _resnet(config: BlockConfig, dtype: Dtype, i: int) -> nn.Module:
    kind = nn.remat(ResnetBlock) if config.remat else ResnetBlock
    return kind(config.features, config.num_groups, config.epsilon, dtype, name=f"resnets_{i}")


def _transformer(config: BlockConfig, dtype: Dtype, i: int) -> nn.Module:
    return SpatialTransformer(
        config.num_heads,
        config.num_groups,
        config.num_transformer_blocks,
        config.linear_projection,
        dtype,
        config.remat,
        config.kernel,
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
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.upsample else x


def _several(condition: Float[Array, "b ..."] | tuple[Float[Array, "_ ..."], ...]) -> tuple[Float[Array, "_ ..."], ...]:
    return condition if isinstance(condition, tuple) else (condition,)


def _keep_products(prim, *inputs, **params) -> bool:
    """Whether the outputs of a convolution, or of a product with a weight, are kept: what costs most to compute again.

    Products with a batch dimension are attention's: their outputs are its largest. Nor is a GEGLU's first, which is
    eight times as wide as its input: all of them are over a third of what would be kept of Stable Diffusion 1.5, and
    an eighth of its forward pass.
    """
    if prim is jax.lax.conv_general_dilated_p:
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
    kernel: str = "xla"  # of attention

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
                kernel=self.kernel,
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
