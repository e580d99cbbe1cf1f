"""CLIP's tokenizer, from the files of a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from transformers import CLIPTokenizer

from ddpo_jax.errors import UserError

LONGEST = 10_000  # tokens; transformers puts 1e30 where the length is missing


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a diffusers folder, from vocab.json and merges.txt or from tokenizer.json.

    Raises:
        UserError: the files are missing or broken.
    """
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        _check_whole(vocab, merges)
    elif not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json; the model folder is not whole"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{folder}: not a CLIP tokenizer ({type(error).__name__}: {error})") from error
    if not isinstance(tokenizer.model_max_length, int) or not 0 < tokenizer.model_max_length <= LONGEST:
        raise UserError(f"{folder}/tokenizer_config.json: expected model_max_length, such as 77; copy the file anew")
    return tokenizer


def _check_whole(vocab: Path, merges: Path) -> None:
    # A vocabulary is 256 bytes, the same at a word's end, one entry a merge, and two specials. Fewer merges than that
    # would split words another way, and say nothing.
    try:
        num_entries = len(json.loads(vocab.read_text(encoding="utf-8")))
        num_merges = sum(1 for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line.strip())
    except (ValueError, TypeError) as error:
        raise UserError(f"{vocab.parent}: not a CLIP tokenizer ({error})") from None
    if num_merges < num_entries - 514:
        raise UserError(f"{merges}: {num_merges} merges; {vocab.name} expects {num_entries - 514}. Copy the file anew")


def check_tokenizer(tokenizer: CLIPTokenizer, path: Path, config: str, max_length: int, vocab_size: int) -> None:
    """Raises UserError if it makes tokens that the text encoder described in `config` does not know."""
    if tokenizer.model_max_length > max_length or len(tokenizer) > vocab_size:
        raise UserError(
            f"{path}: the tokenizer makes up to {tokenizer.model_max_length} tokens out of {len(tokenizer)}, but"
            f" {config} reads {max_length} out of {vocab_size}; copy the tokenizer anew"
        )


def tokenize_all(tokenizers: Sequence[CLIPTokenizer], texts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
    """The token ids of each tokenizer, one after the other, as Model.encode_text takes them."""
    return np.concatenate([tokenize(tokenizer, texts) for tokenizer in tokenizers], axis=1)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
    """Token ids, cut and padded to the tokenizer's own length (77 for Stable Diffusion)."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return np.asarray(encoded["input_ids"], np.int32)


def find_too_long(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> tuple[str, ...]:
    """The texts that `tokenize` cuts."""
    lengths = (len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"])
    return tuple(text for text, length in zip(texts, lengths, strict=True) if length > tokenizer.model_max_length)
