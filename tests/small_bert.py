"""Folders of small BERT-family encoders: random weights, the real layout, tokenizers of a few hundred tokens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small import random_params
from tokenizers import ByteLevelBPETokenizer

from ddpo_jax.models.encoder import FAMILIES
from ddpo_jax.models.folder import WEIGHTS, write_json, write_weights

TEXTS = (
    "A fox stands on a red field.",
    "an owl",
    "two whales swim, far from the shore",
    "the fox's owl was not there at all; it flew over the shore and the field",
)
WORDS = "a an the fox owl whale stand ##s on red field two swim far from shore , . ' s ; was not it ##er"
LENGTH = 24  # tokens of the longest text

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": LENGTH,
}
CONFIGS = {
    "bert": COMMON | {"model_type": "bert", "vocab_size": 40, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "roberta": COMMON
    | {
        "model_type": "roberta",
        "vocab_size": 300,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "max_position_embeddings": LENGTH + 2,
    },
    "deberta": COMMON
    | {
        "model_type": "deberta",
        "vocab_size": 300,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "pos_att_type": "c2p|p2c",
        "pad_token_id": 0,
    },
}
SPECIALS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "deberta": ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"),
}


def write_tokenizer(folder: Path, model_type: str, **fields) -> None:
    """Vocabulary files alone, as the first published folders have them."""
    folder.mkdir(parents=True, exist_ok=True)
    specials, size = SPECIALS[model_type], CONFIGS[model_type]["vocab_size"]
    if model_type == "bert":
        entries = [*specials, *WORDS.split()]
        entries += [f"[unused{i}]" for i in range(size - len(entries))]
        (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries))
    else:
        tokenizer = ByteLevelBPETokenizer()
        texts = [f" {text}" for text in TEXTS] * 4
        tokenizer.train_from_iterator(texts, vocab_size=size, show_progress=False, special_tokens=list(specials))
        tokenizer.save_model(str(folder))
    write_json(folder / "tokenizer_config.json", {"model_max_length": LENGTH} | fields)


def write_encoder(folder: Path, model_type: str, *, seed: int = 0, **fields) -> Path:
    """Writes a whole small encoder, its tokenizer too, and returns its folder."""
    config = CONFIGS[model_type] | fields
    family = FAMILIES[model_type]
    module = family.module(family.parse(config), config["num_hidden_layers"])
    tokens = jnp.zeros((1, 3), jnp.int32)
    write_tokenizer(folder, model_type)
    write_json(folder / "config.json", config)
    params = jax.tree_util.tree_map_with_path(spread, random_params(module, seed, tokens, tokens == 0))
    write_weights(folder / WEIGHTS["text_encoder"], params, dtype=np.float32)
    return folder


def spread(path, value):
    """Embeddings and norms of usual size, and biases around 0, so that states point every way."""
    name = path[-1].key
    if name == "embedding":
        return value / value.std()
    return {"scale": 2 * value, "bias": value - 0.5}.get(name, value)


def edit_json(path: Path, **changes) -> None:
    """Changes fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
