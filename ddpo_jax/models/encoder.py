"""A folder's text encoder of the BERT family: which one it is, its weights and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from transformers import BertTokenizer, DebertaTokenizer, RobertaTokenizer, TokenizersBackend, XLMRobertaTokenizer

from ddpo_jax.errors import UserError
from ddpo_jax.models.bert import BERTConfig, BERTModel, bert_config, roberta_config
from ddpo_jax.models.deberta import DeBERTaConfig, DeBERTaModel, deberta_config
from ddpo_jax.models.folder import parsed, read_json, read_weights, stored_as, weight_files
from ddpo_jax.models.locate import TORCH_FILE
from ddpo_jax.models.tokenizer import LONGEST
from ddpo_jax.models.torch_file import read_torch_weights
from ddpo_jax.types import PyTree


class Family(NamedTuple):
    """What differs between the encoders that a model_type names."""

    parse: Callable  # of config.json -> config
    module: Callable  # config, num_layers -> the network
    prefix: str  # of the encoder's tensors in a folder that holds a head too
    tokenizer: str  # the class of one that names none


FAMILIES = {
    "bert": Family(bert_config, BERTModel, "bert.", "BertTokenizer"),
    "roberta": Family(roberta_config, BERTModel, "roberta.", "RobertaTokenizer"),
    "xlm-roberta": Family(roberta_config, BERTModel, "roberta.", "XLMRobertaTokenizer"),
    "deberta": Family(deberta_config, DeBERTaModel, "deberta.", "DebertaTokenizer"),
}

# Not AutoTokenizer, which imports torch where it is installed.
TOKENIZERS = {
    "BertTokenizer": BertTokenizer,
    "RobertaTokenizer": RobertaTokenizer,
    "XLMRobertaTokenizer": XLMRobertaTokenizer,
    "DebertaTokenizer": DebertaTokenizer,
    "PreTrainedTokenizer": TokenizersBackend,  # PreTrainedTokenizerFast is its old name
    "TokenizersBackend": TokenizersBackend,
}

# What a published folder holds beside the encoder: the pooler, and the heads of pretraining and of classification.
HEADS = re.compile(r"(pooler|cls|lm_head|lm_predictions|classifier|qa_outputs)\.")
LAYER = re.compile(r"encoder\.layer\.(\d+)\.")

FEWEST = 0.9  # of config.json's tokens that the tokenizer knows; published ones round their number up a little
MOST_SPECIALS = 16  # in a vocabulary of bytes and merges; the published ones have 9


class Encoder(NamedTuple):
    """A folder's encoder, of which no weights are read yet."""

    folder: Path
    model_type: str
    config: BERTConfig | DeBERTaConfig
    tokenizer: str  # the class that its config.json or else its family names


def read_encoder(folder: Path) -> Encoder:
    """Which encoder is in a folder as transformers saves it.

    Raises:
        UserError: config.json is missing or broken, or tells of another network; the message names the file.
    """
    path = folder / "config.json"
    fields = read_json(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = "; of DeBERTa only version 1, such as microsoft/deberta-large-mnli" if model_type == "deberta-v2" else ""
        raise UserError(f"{path}: model_type {model_type!r} is not supported; expected {', '.join(FAMILIES)}{hint}")
    family = FAMILIES[model_type]
    return Encoder(
        folder, model_type, parsed(path, family.parse, fields), fields.get("tokenizer_class") or family.tokenizer
    )


def read_parameters(encoder: Encoder, num_layers: int, *, place: Callable) -> tuple[Callable, PyTree]:
    """(apply, params) of its first layers: apply(params, tokens (b, s), mask (b, s)) -> hidden states (b, s, d).

    float32. Later layers, poolers and heads are passed over. place: as in read_weights. Nothing else opens an encoder's
    weights.

    Raises:
        UserError: the weights are missing, broken or another network's; the message names the file.
    """
    family = FAMILIES[encoder.model_type]
    module = family.module(encoder.config, num_layers)
    tokens = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens == 0)["params"]

    def passed_over(name: str) -> bool:
        return is_passed_over(name, encoder.config, num_layers)

    how = {"prefix": family.prefix, "passed_over": passed_over, "place": place}
    names = [path.name for path in encoder.folder.glob("*")]
    if TORCH_FILE in names and not stored_as(names, "model", ""):
        params = read_torch_weights(encoder.folder / TORCH_FILE, shapes, **how)
    else:
        params = read_weights(weight_files(encoder.folder, "model", None), shapes, **how)

    def apply(params: PyTree, tokens: Int[Any, "b s"], mask: Bool[Any, "b s"]) -> Float[Array, "b s d"]:
        return module.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask))

    return apply, params


def is_passed_over(name: str, config: BERTConfig | DeBERTaConfig, num_layers: int) -> bool:
    """Whether a tensor, its family's prefix removed, is none of the first layers' but has its place in the folder."""
    layer = LAYER.match(name)
    if layer:
        return num_layers <= int(layer[1]) < config.num_layers
    if isinstance(config, DeBERTaConfig) and not config.has_positions and name.startswith("embeddings.position_embedd"):
        return True  # published with the weights, and read by no layer
    return HEADS.match(name) is not None


class TextTokenizer(NamedTuple):
    tokenize: Callable  # texts -> the token ids of each, with those at its ends, cut at max_length
    ends: frozenset[int]  # the ids of the tokens that stand at a text's ends
    max_length: int


def load_text_tokenizer(encoder: Encoder) -> TextTokenizer:
    """The tokenizer of an encoder's folder, used as bert-score uses it.

    A text is stripped, and RoBERTa's own tokenizer sees a space before it, as inside a sentence, unless its
    tokenizer_config.json says add_prefix_space=false. max_length is the
    tokenizer's own, or config.json's where that is less or the tokenizer names none.

    Raises:
        UserError: the tokenizer's files are missing, broken or another model's.
    """
    own_fields = encoder.folder / "tokenizer_config.json"
    fields = read_json(own_fields) if own_fields.is_file() else {}
    name = fields.get("tokenizer_class") or encoder.tokenizer
    tokenizer = open_tokenizer(encoder.folder, name, encoder.config.vocab_size)
    longest, own = encoder.config.max_length, tokenizer.model_max_length
    length = min(int(own), longest) if 0 < own <= LONGEST else longest
    # Transformers 5 takes no add_prefix_space in a call, and passes over bert-score's without a word.
    space = " " if isinstance(tokenizer, RobertaTokenizer) and fields.get("add_prefix_space", True) else ""

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        stripped = [text.strip() for text in texts]
        marked = [space + text if text else text for text in stripped]
        return tokenizer(marked, truncation=True, max_length=length)["input_ids"]

    tokenize([""])  # it keeps the length of its first call, which threads must not set while others read
    ends = frozenset(id for id in (tokenizer.cls_token_id, tokenizer.sep_token_id) if id is not None)
    return TextTokenizer(tokenize, ends, length)


def open_tokenizer(folder: Path, name: str, vocab_size: int, *, config: str = "config.json") -> TokenizersBackend:
    """The tokenizer of a folder. name: of its class.  config: the file that says vocab_size, for errors.

    Raises:
        UserError: its files are missing, broken or another model's.
    """
    known = str(name).removesuffix("Fast")
    if known not in TOKENIZERS:
        raise UserError(f"{folder}: tokenizer_class {name!r} is not supported; expected one of {', '.join(TOKENIZERS)}")
    _check_files(folder, TOKENIZERS[known])
    try:
        tokenizer = TOKENIZERS[known].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{folder}: not a {known} ({reason}); copy the tokenizer's files anew") from error
    if not FEWEST * vocab_size <= len(tokenizer) <= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, but {config} reads vocab_size={vocab_size};"
            " copy the tokenizer's files anew"
        )
    return tokenizer


def _check_files(folder: Path, tokenizer: type[TokenizersBackend]) -> None:
    """Raises UserError for a folder without this tokenizer's files, which transformers takes for an empty one."""
    files = {BertTokenizer: ("vocab.txt",)}.get(tokenizer, ())
    if tokenizer in (RobertaTokenizer, DebertaTokenizer):
        files = ("vocab.json", "merges.txt")
    if (folder / "tokenizer.json").is_file():
        return
    if not files or not all((folder / name).is_file() for name in files):
        wanted = f"tokenizer.json, or {' and '.join(files)}" if files else "tokenizer.json"
        raise UserError(f"{folder}: expected {wanted}; the model folder is not whole")
    if files == ("vocab.json", "merges.txt"):
        num_entries = len(read_json(folder / "vocab.json"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        num_merges = sum(1 for line in lines if line.strip() and not line.startswith("#version"))
        # A vocabulary is 256 bytes, one entry a merge, and special tokens. Fewer merges would split words another way,
        # and say nothing.
        if num_merges < num_entries - 256 - MOST_SPECIALS:
            raise UserError(
                f"{folder}/merges.txt: {num_merges} merges are too few for the {num_entries} entries of vocab.json;"
                " copy the file anew"
            )
