"""BLIP (Li et al. 2022) as ImageReward has it: a text encoder that looks at a picture. Named as in the published file.

It computes in what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.errors import UserError, number
from ddpo_jax.models.attention import attend
from ddpo_jax.models.bert import BERTConfig, BERTModel, bert_config
from ddpo_jax.models.clip import MLP, TowerConfig, VisionConfig, tower_config
from ddpo_jax.models.mlp import ScoreMLP
from ddpo_jax.models.norms import layer_norm

MAX_LENGTH = 35  # tokens of a text, with those at its ends

# What no published file says, for there is one size: a ViT-L/16 of timm's kind.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


class BLIPConfig(NamedTuple):
    text: BERTConfig
    vision: VisionConfig


def blip_config(fields: Mapping[str, Any]) -> BLIPConfig:
    """The BLIPConfig of a parsed med_config.json; absent fields are the published model's.

    A `vision_config`, which the published file has not, gives another size of the ViT, in transformers' words.
    `encoder_width` is not read: the published file's is another model's, and the width is the ViT's.
    """
    vision = VISION_DEFAULTS | fields.get("vision_config", {})
    found = BLIPConfig(
        text=bert_config({"vocab_size": 30524} | fields)._replace(num_types=0),
        vision=VisionConfig(
            tower=tower_config(vision, heads=16),
            image_size=number(vision, "image_size", 224),
            patch_size=number(vision, "patch_size", 16),
        ),
    )
    if found.text.num_positions < MAX_LENGTH:
        raise UserError(f"max_position_embeddings={found.text.num_positions}: expected at least {MAX_LENGTH}")
    if found.vision.image_size % found.vision.patch_size:
        raise UserError(
            f"image_size={found.vision.image_size} must be divisible by patch_size={found.vision.patch_size}"
        )
    return found


class SelfAttention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        query, key, value = jnp.split(nn.Dense(3 * x.shape[-1], name="qkv")(x), 3, axis=-1)
        return nn.Dense(x.shape[-1], name="proj")(attend(query, key, value, num_heads=self.num_heads))


class Block(nn.Module):
    config: TowerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        config = self.config
        x = x + SelfAttention(config.num_heads, name="attn")(layer_norm(config.epsilon, None, "norm1")(x))
        return x + MLP(config, None, name="mlp")(layer_norm(config.epsilon, None, "norm2")(x))


class Patches(nn.Module):
    width: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b s d"]:
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(self.width, size, strides=size, padding="VALID", name="proj")(pixels)
        return patches.reshape(pixels.shape[0], -1, self.width)


class VisionTransformer(nn.Module):
    """The states of an image's class token and patches (Dosovitskiy et al. 2021); it is resized and standardised."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b s d"]:
        tower, init = self.config.tower, nn.initializers.normal(0.02)
        x = Patches(tower.width, self.config.patch_size, name="patch_embed")(pixels)
        first = self.param("cls_token", init, (1, 1, tower.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, tower.width)), x], axis=1)
        x = x + self.param("pos_embed", init, (1, *x.shape[1:]))
        for i in range(tower.num_layers):
            x = Block(tower, name=f"blocks_{i}")(x)
        return layer_norm(tower.epsilon, None, "norm")(x)


class BLIP(nn.Module):
    """The states of a text's tokens, of which every layer has looked at the picture."""

    config: BLIPConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b H W 3"], tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        text = self.config.text
        picture = VisionTransformer(self.config.vision, name="visual_encoder")(pixels)
        return BERTModel(text, text.num_layers, name="text_encoder")(tokens, mask, picture)


class ImageReward(nn.Module):
    """BLIP, and a head over its first token's state (Xu et al. 2023)."""

    config: BLIPConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b H W 3"], tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]
    ) -> Float[Array, " b"]:
        return ScoreMLP(name="mlp")(BLIP(self.config, name="blip")(pixels, tokens, mask)[:, 0])
