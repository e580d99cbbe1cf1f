"""The tiny VAE: 64x64 pixels to 8x8x4 latents, trained for reconstruction with a light KL term."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.models.folder import write_json, write_weights
from ddpo_jax.models.vae import AutoencoderKL, vae_config
from ddpo_jax.tiny.fit import fit, rendered
from ddpo_jax.tiny.render import RESOLUTION

BATCH = 16
FIRST_INDEX = 2_000_000_000
HELD_OUT_INDEX = 9_000_000_000
KL_WEIGHT = 1e-4  # a nat of a latent, against the mean squared error of pixels in [-1, 1]

CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
}


def psnr(mean_squared_error: float) -> float:
    """Decibels, for pixels in [-1, 1]."""
    return 10 * np.log10(4 / mean_squared_error)


def train(workdir: Path, folder: Path, *, num_steps: int) -> dict[str, float]:
    """Trains the tiny VAE, writes it to `folder`/vae, and returns its figures on held-out pictures."""
    workdir.mkdir(parents=True, exist_ok=True)
    module = AutoencoderKL(vae_config(CONFIG))

    def make_batch(step):
        return rendered(FIRST_INDEX + step * BATCH, BATCH)[0] * 2 - 1

    def reconstruct(params, pixels, key):
        mean, log_variance = module.apply({"params": params}, pixels, method="encode")
        latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return module.apply({"params": params}, latent, method="decode"), mean, log_variance

    def loss(params, pixels, key):
        out, mean, log_variance = reconstruct(params, pixels, key)
        error = jnp.mean((out - pixels) ** 2)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        return error + KL_WEIGHT * kl, {"psnr": 10 * jnp.log10(4 / error), "kl": kl, "latent_std": mean.std()}

    def init(key):
        return module.init(key, jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]

    params = fit(loss, init, make_batch, workdir, num_steps=num_steps, learning_rate=2e-3)
    held_out = rendered(HELD_OUT_INDEX, 256)[0] * 2 - 1
    out, mean, _ = jax.jit(reconstruct)(params, held_out, jax.random.key(2))
    std = float(jnp.std(mean))
    write_json(folder / "vae" / "config.json", {**CONFIG, "scaling_factor": round(1 / std, 5)})
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", params, dtype=np.float16)
    return {"psnr": psnr(float(jnp.mean((out - held_out) ** 2))), "latent_std": std, "num_steps": num_steps}
