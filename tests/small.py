"""Model folders small enough to make in a test: random weights, the real layout."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.export import PIPELINE
from ddpo_jax.models.clip import CLIPModel, CLIPTextModel, clip_config, text_config
from ddpo_jax.models.folder import WEIGHTS, write_json, write_weights
from ddpo_jax.models.unet import UNet2DConditionModel, unet_config
from ddpo_jax.models.vae import AutoencoderKL, vae_config
from ddpo_jax.tiny import unet as tiny
from ddpo_jax.tiny.tokenizer import MAX_LENGTH, VOCAB_SIZE, write_tokenizer

WIDTH = 16

TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
    "projection_dim": WIDTH,
}

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 4,
    "sample_size": 4,
}

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}

SCHEDULER = tiny.SCHEDULER | {"prediction_type": "epsilon"}  # as the 1.x family predicts

CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": WIDTH,
    "text_config": {**TEXT, "model_type": "clip_text_model"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "image_size": 16,
        "patch_size": 4,
    },
}


def random_params(module, seed, *inputs):
    """Parameters with every leaf random, biases and norms too, so that no mistake can hide behind a 0 or a 1."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (len(leaf.shape) == 1) * 0.5).astype(np.float32)

    return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


def write_folder(folder: Path, *, seed: int = 0, scheduler: dict | None = None) -> Path:
    """Writes a whole small Stable Diffusion and returns its folder."""
    side = UNET["sample_size"]
    text = random_params(CLIPTextModel(text_config(TEXT)), seed, jnp.zeros((1, MAX_LENGTH), jnp.int32))
    unet = random_params(
        UNet2DConditionModel(unet_config(UNET)),
        seed + 1,
        jnp.zeros((1, side, side, 4)),
        jnp.zeros(1),
        jnp.zeros((1, MAX_LENGTH, WIDTH)),
    )
    vae = random_params(AutoencoderKL(vae_config(VAE)), seed + 2, jnp.zeros((1, 16, 16, 3)))
    write_tokenizer(folder / "tokenizer")
    for part, config, params, prefix in (
        ("text_encoder", TEXT, text, "text_model."),
        ("unet", UNET, unet, ""),
        ("vae", VAE, vae, ""),
    ):
        write_json(folder / part / "config.json", config)
        write_weights(folder / part / WEIGHTS[part], params, dtype=np.float32, prefix=prefix)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler or SCHEDULER)
    write_json(folder / "model_index.json", PIPELINE)
    return folder


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """Writes a whole small CLIP, its tokenizer too, and returns its folder."""
    size = CLIP["vision_config"]["image_size"]
    inputs = jnp.zeros((1, MAX_LENGTH), jnp.int32), jnp.zeros((1, size, size, 3))
    params = random_params(CLIPModel(clip_config(CLIP)), seed, *inputs)
    write_tokenizer(folder)
    write_json(folder / "config.json", CLIP)
    write_weights(folder / "model.safetensors", params, dtype=np.float32)
    return folder
