"""A small CLIP tokenizer: byte-level BPE with merges learned from the words that the project's prompts use."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ddpo_jax.models.folder import write_json
from ddpo_jax.tiny.render import ANIMALS, COLORS, PATTERNS

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_LENGTH = 32  # tokens; the longest prompt of the built-in sets takes 16
VOCAB_SIZE = 1024
PROMPTS = Path(__file__).parents[1] / "assets" / "prompts"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges, in CLIP's layout: bytes, bytes that end a word, merges, start, end."""
    words = " ".join([*ANIMALS, *COLORS, *PATTERNS, "background on an a in at of with"]).lower().split() * 8
    for path in sorted(PROMPTS.glob("*.txt")):
        words += path.read_text(encoding="utf-8").lower().split()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=single,  # fixes their order, by which ties between merges are broken
            end_of_word_suffix=WORD_END,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    merges = merges[: VOCAB_SIZE - len(single) - 2]
    tokens = [*single, *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizer(folder: Path) -> None:
    """Writes the tokenizer in the forms that old and new transformers read."""
    vocab, merges = vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END},
    )
