"""BERTScore: how well two texts say the same, by any encoder of the BERT family in transformers' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from ddpo_jax.errors import UserError
from ddpo_jax.models.encoder import (
    Encoder,
    TextTokenizer,
    load_text_tokenizer,
    read_encoder,
    read_parameters,
)
from ddpo_jax.models.locate import encoder_files, locate
from ddpo_jax.sharding import first_device
from ddpo_jax.types import PyTree

# The layer whose states agree best with people's judgement, as bert-score 0.3.13 has it (model2layers; its authors'
# measurements on WMT16), by model_type, number of layers and hidden size. Where several published models look so, it is
# that of the one in brackets.
LAYERS = {
    ("bert", 2, 128): 1,
    ("bert", 4, 256): 3,
    ("bert", 4, 512): 3,
    ("bert", 8, 512): 6,
    ("bert", 12, 768): 9,  # bert-base-uncased
    ("bert", 24, 1024): 18,
    ("roberta", 6, 768): 5,
    ("roberta", 12, 768): 10,
    ("roberta", 24, 1024): 17,  # roberta-large; 19 for roberta-large-mnli
    ("xlm-roberta", 12, 768): 9,
    ("xlm-roberta", 24, 1024): 17,
    ("deberta", 12, 768): 9,
    ("deberta", 24, 1024): 18,  # deberta-large-mnli; 16 for deberta-large
    ("deberta", 48, 1024): 40,  # deberta-xlarge-mnli; 18 for deberta-xlarge
}

# A program is compiled for each length and each number of pairs that occurs, so there are few: texts are padded to one
# of these lengths (or the model's, if that is less), pairs to FEW or to as many as TOKENS hold.
LENGTHS = (32, 64, 128, 256)
FEW = 8
TOKENS = 4096


class Texts(NamedTuple):
    """Tokenised texts, padded to one length."""

    tokens: Int32[Any, "b s"]
    mask: Bool[Any, "b s"]  # what is not padding
    weight: Float32[Any, "b s"]  # of a token in its text's mean: 1, but 0 at the ends and in the padding


class Scores(NamedTuple):
    precision: Float[Any, " n"]
    recall: Float[Any, " n"]
    f1: Float[Any, " n"]


class LoadedBERT(NamedTuple):
    """An encoder's float32 parameters, its tokenizer, and the compiled comparison."""

    params: PyTree
    tokenizer: TextTokenizer
    compare: Callable  # params, candidates: Texts, references: Texts -> Scores (b,); jitted


def load(source: str, *, layer: int, place: Callable = first_device) -> LoadedBERT:
    """The encoder in a folder as transformers saves it: config.json, model.safetensors and the tokenizer's files.

    source: `reward.bert_model`: a folder or a hub id.  layer: `reward.bert_layer`: after how many layers the states are
    compared; 0 for bert-score's own choice.  place: as in read_weights.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file or the field.
    """
    if source in ("", "tiny"):
        raise UserError(
            f"reward.bert_model={source!r}: BERTScore needs an encoder of the BERT family; give a folder as"
            " transformers saves it, or a hub id such as FacebookAI/roberta-large"
        )
    encoder = read_encoder(locate(source, field="reward.bert_model", hub_files=encoder_files))
    num_layers = choose_layer(encoder, layer)
    tokenizer = load_text_tokenizer(encoder)
    apply, params = read_parameters(encoder, num_layers, place=place)

    def compare(params: PyTree, candidates: Texts, references: Texts) -> Scores:
        with jax.default_matmul_precision("highest"):
            tokens = jnp.concatenate([candidates.tokens, references.tokens])
            mask = jnp.concatenate([candidates.mask, references.mask])
            candidate, reference = jnp.split(apply(params, tokens, mask), 2)
            return match(candidate, reference, candidates=candidates, references=references)

    return LoadedBERT(params, tokenizer, jax.jit(compare))


def score(bert: LoadedBERT, candidates: Sequence[str], references: Sequence[str]) -> Scores:
    """BERTScore of each candidate against its reference, as float32 numpy (n,).

    It is bert-score's without idf and without rescaling. Where a text is empty all three are 0.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates and {len(references)} references; expected one for each")
    tokens = [bert.tokenizer.tokenize(texts) if texts else [] for texts in (candidates, references)]
    lengths = [max(map(len, pair)) for pair in zip(*tokens, strict=True)]
    pending = [
        (rows, bert.compare(bert.params, *(_pad(side, rows, shape, bert.tokenizer.ends) for side in tokens)))
        for rows, shape in batches(lengths, bert.tokenizer.max_length)
    ]
    found = np.zeros((3, len(candidates)), np.float32)
    for rows, scores in pending:
        found[:, rows] = np.stack(scores)[:, : len(rows)]
    return Scores(*found)


def recall(bert: LoadedBERT) -> Callable[[Sequence[str], Sequence[str]], Float32[np.ndarray, " n"]]:
    """A function of candidates and references: how much of each reference its candidate says."""
    return lambda candidates, references: score(bert, candidates, references).recall


def match(
    candidate: Float[Array, "b c d"], reference: Float[Array, "b r d"], *, candidates: Texts, references: Texts
) -> Scores:
    """BERTScore from hidden states.

    R = Σᵢ wᵢ maxⱼ xᵢ·x̂ⱼ / Σᵢ wᵢ,  P = Σⱼ ŵⱼ maxᵢ xᵢ·x̂ⱼ / Σⱼ ŵⱼ,  F = 2 P R / (P + R)

    Zhang et al. 2020, Sec. 3 (R_BERT, P_BERT, F_BERT), with x a reference's states and x̂ a candidate's, made unit
    vectors. The tokens at a text's ends are matched with, but do not count (w = 0). A text in which nothing counts is
    empty, and scores 0. bert-score takes padding for similarity 0, which hides negative ones in uneven batches; here
    padding is matched with nothing.
    """
    similarity = jnp.einsum("bcd,brd->bcr", _unit(candidate), _unit(reference))
    known = candidates.mask[:, :, None] & references.mask[:, None, :]
    similarity = jnp.where(known, similarity, -jnp.inf)
    precision = _mean(similarity.max(axis=2), candidates.weight)
    recall = _mean(similarity.max(axis=1), references.weight)
    scored = (candidates.weight.sum(axis=1) > 0) & (references.weight.sum(axis=1) > 0)
    total = precision + recall
    f1 = 2 * precision * recall / jnp.where(total == 0, 1.0, total)
    return Scores(*(jnp.where(scored, value, 0.0) for value in (precision, recall, f1)))


def choose_layer(encoder: Encoder, layer: int) -> int:
    """After how many layers the states are compared: `layer`, or where that is 0 bert-score's own choice.

    Raises:
        UserError: there are not so many layers, or bert-score has no choice for such an encoder.
    """
    num_layers, width = encoder.config.num_layers, encoder.config.layer.width
    if not 0 <= layer <= num_layers:
        raise UserError(f"reward.bert_layer={layer}: expected 1 to {num_layers}, or 0 for bert-score's own choice")
    if layer:
        return layer
    if (encoder.model_type, num_layers, width) not in LAYERS:
        raise UserError(
            f"{encoder.folder}: bert-score has no layer of its own for a {encoder.model_type} of {num_layers} layers"
            f" and hidden size {width}; set reward.bert_layer, 1 to {num_layers}"
        )
    return LAYERS[encoder.model_type, num_layers, width]


def batches(lengths: Sequence[int], max_length: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The rows of each batch, and the (number of pairs, length) that it is padded to; every row is in one."""
    steps = [length for length in LENGTHS if length < max_length] + [max_length]
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(next(step for step in steps if length <= step), []).append(row)
    for length, rows in sorted(by_length.items()):
        most = max(FEW, TOKENS // length)
        for start in range(0, len(rows), most):
            batch = rows[start : start + most]
            yield batch, (FEW if len(batch) <= FEW else most, length)


def _pad(tokens: Sequence[Sequence[int]], rows: Sequence[int], shape: tuple[int, int], ends: frozenset[int]) -> Texts:
    texts = Texts(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32))
    for i in range(shape[0]):
        ids = tokens[rows[i] if i < len(rows) else rows[0]]  # a row of padding alone would have no softmax
        texts.tokens[i, : len(ids)] = ids
        texts.mask[i, : len(ids)] = True
        texts.weight[i, : len(ids)] = [id not in ends for id in ids]
    return texts


def _unit(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _mean(x: Float[Array, "b s"], weight: Float[Any, "b s"]) -> Float[Array, " b"]:
    """Over what has weight; 0 where nothing has."""
    return jnp.where(weight > 0, x * weight, 0.0).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
