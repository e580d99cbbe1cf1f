"""DeBERTa's encoder, version 1 (He et al. 2021), named as transformers names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.errors import UserError, number
from ddpo_jax.models.bert import Layer, LayerConfig, layer_config
from ddpo_jax.models.norms import layer_norm


class DeBERTaConfig(NamedTuple):
    layer: LayerConfig
    num_layers: int  # of the whole encoder; less may be built
    vocab_size: int
    max_length: int  # the most tokens of a text, with those at its ends
    num_types: int  # rows of the table of segments; 0: there is none
    has_positions: bool  # whether the embeddings hold absolute positions; the published ones do not
    max_distance: int | None  # k: tokens that are further apart count as so far; None: no relative positions
    terms: tuple[str, ...]  # of the attention: c2p (content to position), p2c


def deberta_config(fields: Mapping[str, Any]) -> DeBERTaConfig:
    """The DeBERTaConfig of a parsed config.json; absent fields have transformers' defaults."""
    terms = fields.get("pos_att_type") or ()
    terms = tuple(term.strip() for term in terms.lower().split("|")) if isinstance(terms, str) else tuple(terms)
    if len(set(terms)) != len(terms) or not set(terms) <= {"c2p", "p2c"}:
        raise UserError(f"pos_att_type={fields['pos_att_type']!r} is not supported; expected c2p, p2c or c2p|p2c")
    if fields.get("talking_head"):
        raise UserError("talking_head=True is not supported; expected False")
    layer = layer_config(fields, epsilon=1e-7)
    if fields.get("embedding_size", layer.width) != layer.width:
        raise UserError(f"embedding_size={fields['embedding_size']!r} is not supported; expected {layer.width}")
    max_length = number(fields, "max_position_embeddings", 512)
    distance = number(fields, "max_relative_positions", -1, above=-2)
    return DeBERTaConfig(
        layer=layer,
        num_layers=number(fields, "num_hidden_layers", 12),
        vocab_size=number(fields, "vocab_size", 50265),
        max_length=max_length,
        num_types=number(fields, "type_vocab_size", 0, above=-1),
        has_positions=bool(fields.get("position_biased_input", True)),
        max_distance=(distance if distance > 0 else max_length) if fields.get("relative_attention") else None,
        terms=terms,
    )


class Embeddings(nn.Module):
    """The normalised embeddings of tokens, and of positions and segments where the config has them."""

    config: DeBERTaConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        config, width = self.config, self.config.layer.width
        x = nn.Embed(config.vocab_size, width, name="word_embeddings")(tokens)
        if config.has_positions:
            positions = jnp.arange(tokens.shape[1])[None]
            x = x + nn.Embed(config.max_length, width, name="position_embeddings")(positions)
        if config.num_types:
            x = x + nn.Embed(config.num_types, width, name="token_type_embeddings")(jnp.zeros_like(tokens))
        return layer_norm(config.layer.epsilon, jnp.float32, "LayerNorm")(x)


class DisentangledAttention(nn.Module):
    """Attention by what tokens hold and by how far they are apart.

    A_ij = (Qc_i·Kc_j + Qc_i·Kr_δ(i,j) + Kc_j·Qr_δ(i,j)) / √(3 d),  δ(i,j) = i - j + k, cut to [0, 2k)

    He et al. 2021, Eq. 3 and 4, where the third term reads δ(j,i); the published code and weights read δ(i,j). With
    fewer terms 3 becomes their number. Heads are stored one after the other, each as its query, key and value.
    """

    num_heads: int
    terms: tuple[str, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], distances: Float[Array, "m d"] | None
    ) -> Float[Array, "b s d"]:
        batch, length, width = x.shape
        size = width // self.num_heads

        def bias(name: str) -> Float[Array, "1 1 n h"]:
            return self.param(name, nn.initializers.zeros, (width,)).reshape(1, 1, self.num_heads, size)

        fused = nn.Dense(3 * width, use_bias=False, name="in_proj")(x)
        query, key, value = jnp.split(fused.reshape(batch, length, self.num_heads, 3 * size), 3, axis=-1)
        query, value = query + bias("q_bias"), value + bias("v_bias")
        scores = jnp.einsum("bqnh,bknh->bnqk", query, key)
        if distances is not None:
            scores = scores + self._by_distance(query, key, distances)
        scores = scores / (size * (1 + len(self.terms))) ** 0.5
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        return jnp.einsum("bnqk,bknh->bqnh", nn.softmax(scores), value).reshape(x.shape)

    def _by_distance(
        self, query: Float[Array, "b s n h"], key: Float[Array, "b s n h"], distances: Float[Array, "m d"]
    ) -> Float[Array, "b n s s"] | float:
        length, k = query.shape[1], distances.shape[0] // 2
        apart = jnp.clip(jnp.arange(length)[:, None] - jnp.arange(length)[None] + k, 0, 2 * k - 1)[None, None]
        heads = (2 * k, *query.shape[2:])
        scores = 0.0
        if "c2p" in self.terms:
            keys = nn.Dense(distances.shape[1], use_bias=False, name="pos_proj")(distances).reshape(heads)
            scores += jnp.take_along_axis(jnp.einsum("bqnh,mnh->bnqm", query, keys), apart, axis=-1)
        if "p2c" in self.terms:
            queries = nn.Dense(distances.shape[1], name="pos_q_proj")(distances).reshape(heads)
            by_key = jnp.einsum("bknh,mnh->bnkm", key, queries)
            scores += jnp.take_along_axis(by_key, apart.swapaxes(-1, -2), axis=-1).swapaxes(-1, -2)
        return scores


class Encoder(nn.Module):
    config: DeBERTaConfig
    num_layers: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        config, distances = self.config, None
        if config.max_distance is not None:
            k, width = config.max_distance, config.layer.width
            reached = min(k, x.shape[1])  # further apart than so no two tokens of these are
            table = nn.Embed(2 * k, width, name="rel_embeddings").embedding
            distances = table[k - reached : k + reached]

        def make_attention(name: str) -> DisentangledAttention:
            return DisentangledAttention(config.layer.num_heads, config.terms, name=name)

        for i in range(self.num_layers):
            x = Layer(config.layer, make_attention, name=f"layer_{i}")(x, mask, distances)
        return x


class DeBERTaModel(nn.Module):
    """The hidden states after the first `num_layers` layers, in float32; the others are not built.

    mask: which tokens are not padding. The states of padding mean nothing.
    """

    config: DeBERTaConfig
    num_layers: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"], mask: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        x = Embeddings(self.config, name="embeddings")(tokens)
        return Encoder(self.config, self.num_layers, name="encoder")(x, mask)
