"""CLIP's two towers (Radford et al. 2021), named as transformers names them. dtype=None: as what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.errors import UserError, number
from ddpo_jax.models.attention import attend
from ddpo_jax.models.layers import Dtype, activation
from ddpo_jax.models.norms import layer_norm


class TowerConfig(NamedTuple):
    """What a text or vision config.json says of the transformer itself."""

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    activation: str
    epsilon: float


class TextConfig(NamedTuple):
    tower: TowerConfig
    vocab_size: int
    max_length: int
    eos_token_id: int
    projection_dim: int | None = None  # of CLIPTextModelWithProjection; None: the pooled state is not projected


class VisionConfig(NamedTuple):
    tower: TowerConfig
    image_size: int
    patch_size: int


class CLIPConfig(NamedTuple):
    text: TextConfig
    vision: VisionConfig
    projection_dim: int


# What a CLIPModel's config.json leaves out where it is of ViT-B/32's size.
TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def tower_config(fields: Mapping[str, Any], *, heads: int) -> TowerConfig:
    config = TowerConfig(
        width=number(fields, "hidden_size"),
        mlp_width=number(fields, "intermediate_size"),
        num_layers=number(fields, "num_hidden_layers"),
        num_heads=number(fields, "num_attention_heads", heads),
        activation=fields.get("hidden_act", "quick_gelu"),
        epsilon=number(fields, "layer_norm_eps", 1e-5, kind=float),
    )
    if config.activation not in ("quick_gelu", "gelu"):
        raise UserError(f"hidden_act={config.activation!r} is not supported; expected quick_gelu or gelu")
    if config.width % config.num_heads:
        raise UserError(f"hidden_size={config.width} must be divisible by num_attention_heads={config.num_heads}")
    return config


def text_config(fields: Mapping[str, Any], *, projects: bool = False) -> TextConfig:
    """The TextConfig of a parsed text_encoder/config.json; absent fields have transformers' defaults.

    projects: whether it is a CLIPTextModelWithProjection's. Others name a projection_dim too, and have no projection.
    """
    return TextConfig(
        tower=tower_config(fields, heads=8),
        vocab_size=number(fields, "vocab_size", 49408),
        max_length=number(fields, "max_position_embeddings", 77),
        eos_token_id=number(fields, "eos_token_id", 49407, above=-1),
        projection_dim=number(fields, "projection_dim", 512) if projects else None,
    )


def clip_config(fields: Mapping[str, Any]) -> CLIPConfig:
    """The CLIPConfig of a parsed config.json of transformers' CLIPModel; absent fields have transformers' defaults."""
    text, vision = (
        defaults | fields[name] | (fields.get(f"{name}_dict") or {})  # the latter in files of before 2023; it counts
        for name, defaults in (("text_config", TEXT_DEFAULTS), ("vision_config", VISION_DEFAULTS))
    )
    return CLIPConfig(
        text=text_config(text),
        vision=VisionConfig(
            tower=tower_config(vision, heads=12),
            image_size=number(vision, "image_size", 224),
            patch_size=number(vision, "patch_size", 32),
        ),
        projection_dim=number(fields, "projection_dim", 512),
    )


class SelfAttention(nn.Module):
    num_heads: int
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "1 1 s s"] | None) -> Float[Array, "b s d"]:
        query, key, value = (
            nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x) for name in ("q_proj", "k_proj", "v_proj")
        )
        out = attend(query, key, value, num_heads=self.num_heads, mask=mask)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(out)


class MLP(nn.Module):
    config: TowerConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        hidden = activation(self.config.activation)(nn.Dense(self.config.mlp_width, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class EncoderLayer(nn.Module):
    config: TowerConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "1 1 s s"] | None) -> Float[Array, "b s d"]:
        config = self.config
        normed = layer_norm(config.epsilon, self.dtype, "layer_norm1")(x)
        x = x + SelfAttention(config.num_heads, self.dtype, name="self_attn")(normed, mask)
        return x + MLP(config, self.dtype, name="mlp")(layer_norm(config.epsilon, self.dtype, "layer_norm2")(x))


class Transformer(nn.Module):
    config: TowerConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "1 1 s s"] | None = None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"]]:
        """The states after the last layer, and before it."""
        before = x
        for i in range(self.config.num_layers):
            before, x = x, EncoderLayer(self.config, self.dtype, name=f"layers_{i}")(x, mask)
        return x, before


class TextEmbeddings(nn.Module):
    config: TextConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        config, width = self.config, self.config.tower.width
        words = nn.Embed(config.vocab_size, width, dtype=self.dtype, name="token_embedding")(tokens)
        positions = nn.Embed(config.max_length, width, dtype=self.dtype, name="position_embedding")(
            jnp.arange(tokens.shape[1])
        )
        return words + positions[None]


class TextStates(NamedTuple):
    """What a text encoder makes of a text."""

    last: Float[Array, "b s d"]  # after the last layer, normalised: what Stable Diffusion 1.x and 2.x attend to
    penultimate: Float[Array, "b s d"]  # before the last layer, as it is: what XL attends to
    pooled: Float[Array, "b p"]  # of `last` at the text's end, projected where there is a projection


class CLIPTextModel(nn.Module):
    """CLIPTextModel and, where its config has a projection_dim, CLIPTextModelWithProjection."""

    config: TextConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> TextStates:
        config = self.config
        causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))[None, None]
        x = TextEmbeddings(config, self.dtype, name="embeddings")(tokens)
        x, penultimate = Transformer(config.tower, self.dtype, name="encoder")(x, causal)
        last = layer_norm(config.tower.epsilon, self.dtype, "final_layer_norm")(x)
        # Configs written before transformers 4.31 say eos_token_id=2, which is wrong: there the end is the largest id.
        ends = tokens if config.eos_token_id == 2 else tokens == config.eos_token_id
        pooled = jnp.take_along_axis(last, ends.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        if config.projection_dim is not None:
            projection = nn.Dense(config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
            pooled = projection(pooled)
        return TextStates(last, penultimate, pooled)


class VisionEmbeddings(nn.Module):
    config: VisionConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b s d"]:
        config, width = self.config, self.config.tower.width
        size = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            width, size, strides=size, padding="VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
        )(pixels if self.dtype is None else pixels.astype(self.dtype))
        patches = patches.reshape(pixels.shape[0], -1, width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,)).astype(patches.dtype)
        first = jnp.broadcast_to(first, (pixels.shape[0], 1, width))
        positions = nn.Embed(patches.shape[1] + 1, width, dtype=self.dtype, name="position_embedding")(
            jnp.arange(patches.shape[1] + 1)
        )
        return jnp.concatenate([first, patches], axis=1) + positions[None]


class ImageStates(NamedTuple):
    """What a vision tower makes of a picture."""

    pooled: Float[Array, "b d"]  # of the class token, normalised
    patches: Float[Array, "b s d"]  # of the patches after the last layer, as they are


class CLIPVisionModel(nn.Module):
    """The states of an image that was already resized and normalised."""

    config: VisionConfig
    dtype: Dtype | None = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b H W 3"]) -> ImageStates:
        tower = self.config.tower
        x = VisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels)
        x = layer_norm(tower.epsilon, self.dtype, "pre_layrnorm")(x)  # transformers' own spelling
        x, _ = Transformer(tower, self.dtype, name="encoder")(x)
        return ImageStates(layer_norm(tower.epsilon, self.dtype, "post_layernorm")(x[:, 0]), x[:, 1:])


class CLIPModel(nn.Module):
    """Both towers with their projections, as transformers' CLIPModel."""

    config: CLIPConfig
    dtype: Dtype | None = jnp.float32

    def setup(self):
        self.text_model = CLIPTextModel(self.config.text, self.dtype)
        self.vision_model = CLIPVisionModel(self.config.vision, self.dtype)
        self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def encode_text(self, tokens: Int[Array, "b s"]) -> Float[Array, "b d"]:
        """Unit embeddings of tokenised texts, in float32 at least."""
        return _unit(self.text_projection(self.text_model(tokens).pooled))

    def encode_image(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b d"]:
        """Unit embeddings of resized and normalised images, in float32 at least."""
        return _unit(self.visual_projection(self.vision_model(pixels).pooled))

    def describe_image(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b e"]:
        """The unit embeddings, and after them the mean and the standard deviation of the patches' states.

        What the embedding leaves out, such as how finely a picture is drawn, is still in the patches.
        """
        states = self.vision_model(pixels)
        patches = states.patches.astype(jnp.promote_types(states.patches.dtype, jnp.float32))
        std = jnp.sqrt(patches.var(axis=1) + 1e-6)  # the slope of a root is infinite at 0
        return jnp.concatenate([_unit(self.visual_projection(states.pooled)), patches.mean(axis=1), std], axis=1)

    def __call__(self, tokens: Int[Array, "b s"], pixels: Float[Array, "n H W 3"]) -> Float[Array, "n b"]:
        """Logits of every image for every text."""
        return jnp.exp(self.logit_scale) * self.encode_image(pixels) @ self.encode_text(tokens).T


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
