"""The tiny CLIP: both towers trained from scratch to tell which caption belongs to which picture."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import CLIPTokenizer

from ddpo_jax.models.clip import CLIPModel, clip_config
from ddpo_jax.models.folder import write_json, write_weights
from ddpo_jax.models.preprocess import MEAN, STD
from ddpo_jax.tiny.fit import fit, rendered
from ddpo_jax.tiny.render import RESOLUTION
from ddpo_jax.tiny.tokenizer import MAX_LENGTH, VOCAB_SIZE, write_tokenizer
from ddpo_jax.types import PyTree

WIDTH = 128
BATCH = 128
FIRST_INDEX = 1_000_000_000  # of the rendered pictures; each stage has its own

TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
    "projection_dim": WIDTH,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": RESOLUTION,
    "patch_size": 8,
    "projection_dim": WIDTH,
}
CONFIG = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": WIDTH,
    "logit_scale_init_value": 2.6592,
    "text_config": {**TEXT, "model_type": "clip_text_model"},
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
}


def contrastive(
    logits: Float[Array, "b b"], same: Float[Array, "b b"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Symmetric cross-entropy (Radford et al. 2021, Fig. 3); equal captions in a batch share their probability."""
    targets = same / same.sum(axis=1, keepdims=True)
    to_text = -(targets * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    to_image = -(targets * jax.nn.log_softmax(logits, axis=0)).sum(axis=0).mean()
    right = jnp.take_along_axis(same, logits.argmax(axis=1)[:, None], axis=1).mean()
    loss = 0.5 * (to_text + to_image)
    return loss, {"loss": loss, "accuracy": right}


def train(workdir: Path, folder: Path, text_folder: Path, *, num_steps: int) -> None:
    """Trains the tiny CLIP and writes it to `folder`, its text tower and tokenizer to `text_folder`'s parts."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_tokenizer(text_folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    module = CLIPModel(clip_config(CONFIG))

    def make_batch(step):
        images, captions = rendered(FIRST_INDEX + step * BATCH, BATCH)
        tokens = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH)["input_ids"]
        return np.array(tokens, np.int32), (images - np.float32(MEAN)) / np.float32(STD)

    def loss(params, batch, key):
        tokens, pixels = batch
        same = (tokens[:, None] == tokens[None, :]).all(axis=-1).astype(jnp.float32)
        return contrastive(module.apply({"params": params}, tokens, pixels), same)

    def init(key) -> PyTree:
        tokens: Int[Array, "b s"] = jnp.zeros((1, MAX_LENGTH), jnp.int32)
        return module.init(key, tokens, jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]

    params = fit(loss, init, make_batch, workdir, num_steps=num_steps, learning_rate=1e-3)
    write_json(folder / "config.json", CONFIG)
    write_weights(folder / "model.safetensors", params, dtype=np.float16)
    write_json(
        text_folder / "text_encoder" / "config.json",
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32", **TEXT},
    )
    write_weights(
        text_folder / "text_encoder" / "model.safetensors",
        params["text_model"],
        dtype=np.float16,
        prefix="text_model.",
    )
