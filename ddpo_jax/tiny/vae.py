"""The tiny VAE: 64x64 pixels to 8x8x16 latents, trained for reconstruction with a light KL term.

16 channels, as newer models have, where SD has 4: at 64 px an 8-fold VAE with 4 blurs every sprite. The other way, a
4-fold VAE with 4 channels, keeps as many numbers of a picture, but the UNet would work on four times the positions.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.models.folder import WEIGHTS, read_weights, write_json, write_weights
from ddpo_jax.models.vae import AutoencoderKL, vae_config
from ddpo_jax.tiny.fit import fit, rendered
from ddpo_jax.tiny.render import RESOLUTION
from ddpo_jax.types import PyTree

LATENT_CHANNELS = 16
BATCH = 8
FIRST_INDEX = 2_000_000_000  # of the rendered pictures; each stage has its own
DECODER_FIRST_INDEX = 2_500_000_000
HELD_OUT_INDEX = 9_000_000_000
HELD_OUT = 256  # pictures that it is measured on
KL_WEIGHT = 5e-4  # a nat of a latent, against the mean squared error of pixels in [-1, 1]
LEARNING_RATE = 1.5e-3

CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
}

MODULE = AutoencoderKL(vae_config(CONFIG))


def psnr(mean_squared_error: float) -> float:
    """Decibels, for pixels in [-1, 1]."""
    return 10 * np.log10(4 / mean_squared_error)


def train(workdir: Path, folder: Path, *, num_steps: int) -> dict[str, float]:
    """Trains the tiny VAE, writes it to `folder`/vae, and returns its figures on held-out pictures."""

    def loss(params, pixels, key):
        out, mean, log_variance = _reconstruct(params, pixels, key)
        error = jnp.mean((out - pixels) ** 2)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        return error + KL_WEIGHT * kl, {"psnr": 10 * jnp.log10(4 / error), "kl": kl, "latent_std": mean.std()}

    params = _fit(loss, _init, FIRST_INDEX, workdir, num_steps)
    figures = _measure(params)
    write_json(folder / "vae" / "config.json", {**CONFIG, "scaling_factor": round(1 / figures["latent_std"], 5)})
    write_weights(folder / "vae" / WEIGHTS["vae"], params, dtype=np.float16)
    return figures


def train_decoder(workdir: Path, folder: Path, *, num_steps: int) -> dict[str, float]:
    """Trains the decoder in `folder`/vae on, for reconstruction alone, and writes it there; the encoder stays.

    What a UNet has learned of the latents stays valid, as with the decoders that were published for SD later on.
    """
    path = folder / "vae" / WEIGHTS["vae"]
    whole = read_weights([path], jax.eval_shape(_init, jax.random.key(0)))

    def loss(decoder, pixels, key):
        out, _, _ = _reconstruct({**whole, **decoder}, pixels, key)
        error = jnp.mean((out - pixels) ** 2)
        return error, {"psnr": 10 * jnp.log10(4 / error)}

    def start(key):
        return {name: whole[name] for name in ("decoder", "post_quant_conv")}

    params = {**whole, **_fit(loss, start, DECODER_FIRST_INDEX, workdir, num_steps)}
    write_weights(path, params, dtype=np.float16)
    return _measure(params)


def _fit(loss, init, first_index: int, workdir: Path, num_steps: int) -> PyTree:
    def make_batch(step):
        return _pixels(first_index + step * BATCH, BATCH)

    workdir.mkdir(parents=True, exist_ok=True)
    return fit(loss, init, make_batch, workdir, num_steps=num_steps, learning_rate=LEARNING_RATE)


def _pixels(first: int, count: int) -> np.ndarray:
    """Rendered pictures in [-1, 1]."""
    return rendered(first, count)[0] * 2 - 1


def _init(key) -> PyTree:
    return MODULE.init(key, jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]


def _reconstruct(params: PyTree, pixels, key) -> tuple:
    """Pixels through a latent drawn from the posterior; the posterior's mean and log-variance."""
    mean, log_variance = MODULE.apply({"params": params}, pixels, method="encode")
    latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return MODULE.apply({"params": params}, latent, method="decode"), mean, log_variance


def _measure(params: PyTree) -> dict[str, float]:
    """Figures on held-out pictures."""
    pixels = _pixels(HELD_OUT_INDEX, HELD_OUT)
    out, mean, _ = jax.jit(_reconstruct)(params, pixels, jax.random.key(2))
    return {"psnr": psnr(float(jnp.mean((out - pixels) ** 2))), "latent_std": float(jnp.std(mean))}
