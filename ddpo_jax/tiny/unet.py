"""The tiny UNet before training, and the files of its folder that no stage trains."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.diffusers_folder import model_index
from ddpo_jax.models.folder import WEIGHTS, write_json, write_weights
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.models.unet_config import unet_config
from ddpo_jax.tiny.clip import WIDTH
from ddpo_jax.tiny.tokenizer import MAX_LENGTH
from ddpo_jax.tiny.vae import LATENT_CHANNELS

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [64, 128],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "sample_size": 8,
}

# Stable Diffusion's own schedule. v as in SD 2.x: where sampling begins, an error in ε counts 7 to 15 times in x_0 and
# next to nothing in the loss, so a small network is late to learn what to draw.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_untrained(folder: Path) -> None:
    """Completes a folder that holds a text encoder, a tokenizer and a VAE with an untrained UNet."""
    module = UNet2DConditionModel(unet_config(CONFIG))
    latent, context = jnp.zeros((1, 8, 8, LATENT_CHANNELS)), jnp.zeros((1, MAX_LENGTH, WIDTH))
    params = jax.jit(module.init)(jax.random.key(0), latent, jnp.zeros(1), context)["params"]
    # A network that starts at 0 learns sooner (the zero-initialised last layer of DDPM and ADM).
    params["conv_out"]["kernel"] = jnp.zeros_like(params["conv_out"]["kernel"])
    write_json(folder / "unet" / "config.json", CONFIG)
    write_weights(folder / "unet" / WEIGHTS["unet"], params, dtype=np.float32)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", model_index("StableDiffusionPipeline"))
