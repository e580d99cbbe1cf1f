"""BERT and RoBERTa encoders (Devlin et al. 2019; Liu et al. 2019), named as transformers names them.

They compute in what their weights are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.errors import UserError, number
from ddpo_jax.models.attention import attend
from ddpo_jax.models.norms import layer_norm


class LayerConfig(NamedTuple):
    """What a config.json says of one transformer layer."""

    width: int
    mlp_width: int
    num_heads: int
    epsilon: float


class BERTConfig(NamedTuple):
    layer: LayerConfig
    num_layers: int  # of the whole encoder; less may be built
    vocab_size: int
    num_positions: int  # rows of the table of positions
    num_types: int  # rows of the table of segments, of which the first is used; 0: there is no table
    pad_token_id: int | None  # RoBERTa's, after which it counts positions; None: BERT counts from 0

    @property
    def max_length(self) -> int:
        """The most tokens of a text, with those at its ends."""
        return self.num_positions if self.pad_token_id is None else self.num_positions - self.pad_token_id - 1


def layer_config(fields: Mapping[str, Any], *, epsilon: float) -> LayerConfig:
    """The LayerConfig of a parsed config.json. epsilon: where it says none."""
    config = LayerConfig(
        width=number(fields, "hidden_size", 768),
        mlp_width=number(fields, "intermediate_size", 3072),
        num_heads=number(fields, "num_attention_heads", 12),
        epsilon=number(fields, "layer_norm_eps", epsilon, kind=float),
    )
    if fields.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"hidden_act={fields['hidden_act']!r} is not supported; expected gelu")
    if config.width % config.num_heads:
        raise UserError(f"hidden_size={config.width} must be divisible by num_attention_heads={config.num_heads}")
    return config


def bert_config(fields: Mapping[str, Any]) -> BERTConfig:
    """The BERTConfig of a parsed config.json of BERT; absent fields have transformers' defaults."""
    return _config(fields, vocab_size=30522, pad_token_id=None)


def roberta_config(fields: Mapping[str, Any]) -> BERTConfig:
    """The BERTConfig of a parsed config.json of RoBERTa or XLM-RoBERTa."""
    pad_token_id = number(fields, "pad_token_id", 1, above=-1)
    config = _config(fields, vocab_size=50265, pad_token_id=pad_token_id)
    if config.max_length < 3:
        raise UserError(
            f"max_position_embeddings={config.num_positions} leaves no room for a text after"
            f" pad_token_id={pad_token_id}, where positions start"
        )
    return config


def _config(fields: Mapping[str, Any], *, vocab_size: int, pad_token_id: int | None) -> BERTConfig:
    if fields.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"position_embedding_type={fields['position_embedding_type']!r} is not supported; expected 'absolute'"
        )
    return BERTConfig(
        layer=layer_config(fields, epsilon=1e-12),
        num_layers=number(fields, "num_hidden_layers", 12),
        vocab_size=number(fields, "vocab_size", vocab_size),
        num_positions=number(fields, "max_position_embeddings", 512),
        num_types=number(fields, "type_vocab_size", 2),
        pad_token_id=pad_token_id,
    )


def positions_of(tokens: Int[Array, "b s"], pad_token_id: int | None) -> Int[Array, "b s"]:
    """Each token's row of the table of positions.

    BERT's are 0, 1, ...; RoBERTa's are pad_token_id + 1, pad_token_id + 2, ..., and its padding stays at pad_token_id.
    """
    if pad_token_id is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    real = (tokens != pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad_token_id


class Embeddings(nn.Module):
    """The normalised sum of a token's own, its position's and its segment's embedding."""

    config: BERTConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        config, width = self.config, self.config.layer.width
        positions = positions_of(tokens, config.pad_token_id)
        x = nn.Embed(config.vocab_size, width, name="word_embeddings")(tokens)
        if config.num_types:
            x = x + nn.Embed(config.num_types, width, name="token_type_embeddings")(jnp.zeros_like(tokens))
        x = x + nn.Embed(config.num_positions, width, name="position_embeddings")(positions)
        return layer_norm(config.layer.epsilon, None, "LayerNorm")(x)


class SelfAttention(nn.Module):
    """Attention of every token to those that are not padding, or to all of a context."""

    num_heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None, context: Float[Array, "b k c"] | None = None
    ) -> Float[Array, "b s d"]:
        query = nn.Dense(x.shape[-1], name="query")(x)
        key, value = (nn.Dense(x.shape[-1], name=name)(x if context is None else context) for name in ("key", "value"))
        mask = None if mask is None else mask[:, None, None, :]
        return attend(query, key, value, num_heads=self.num_heads, mask=mask)


class Residual(nn.Module):
    """A projection to the width of `x`, added to it, and normalised."""

    epsilon: float

    @nn.compact
    def __call__(self, hidden: Float[Array, "b s e"], x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return layer_norm(self.epsilon, None, "LayerNorm")(x + nn.Dense(x.shape[-1], name="dense")(hidden))


class Widen(nn.Module):
    """A projection to the inner width, and an exact GELU."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s e"]:
        return nn.gelu(nn.Dense(self.features, name="dense")(x), approximate=False)


class Attention(nn.Module):
    """Attention and the residual around it. attend: name -> the module that takes (x, *rest)."""

    epsilon: float
    attend: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], *rest: Array | None) -> Float[Array, "b s d"]:
        return Residual(self.epsilon, name="output")(self.attend("self")(x, *rest), x)


class Layer(nn.Module):
    """A transformer layer that normalises after each residual. attend: as Attention's; a context goes to it too."""

    config: LayerConfig
    attend: Callable

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], *rest: Array | None, context: Float[Array, "b k c"] | None = None
    ) -> Float[Array, "b s d"]:
        x = Attention(self.config.epsilon, self.attend, name="attention")(x, *rest)
        if context is not None:
            x = Attention(self.config.epsilon, self.attend, name="crossattention")(x, None, context)
        return Residual(self.config.epsilon, name="output")(Widen(self.config.mlp_width, name="intermediate")(x), x)


class Encoder(nn.Module):
    config: LayerConfig
    num_layers: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], context: Float[Array, "b k c"] | None = None
    ) -> Float[Array, "b s d"]:
        def make_attention(name: str) -> SelfAttention:
            return SelfAttention(self.config.num_heads, name=name)

        for i in range(self.num_layers):
            x = Layer(self.config, make_attention, name=f"layer_{i}")(x, mask, context=context)
        return x


class BERTModel(nn.Module):
    """The hidden states after the first `num_layers` layers of BERT or RoBERTa; the others are not built.

    mask: which tokens are not padding. The states of padding mean nothing.  context: what every layer attends to
    besides, as in BLIP's text encoder; the layers of BERT itself have no such part.
    """

    config: BERTConfig
    num_layers: int

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b s"], mask: Bool[Array, "b s"], context: Float[Array, "b k c"] | None = None
    ) -> Float[Array, "b s d"]:
        x = Embeddings(self.config, name="embeddings")(tokens)
        return Encoder(self.config.layer, self.num_layers, name="encoder")(x, mask, context)
