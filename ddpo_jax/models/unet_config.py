"""What unet/config.json says of a denoiser, and which denoisers there are none of here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddpo_jax.errors import UserError, number, numbers

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
