"""Stable Diffusion from a diffusers folder: a Model of pure functions and its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import CLIPTextModel, TextConfig, text_config
from ddpo_jax.models.folder import WEIGHTS, locate, read_json, read_weights
from ddpo_jax.models.unet import UNet2DConditionModel, UNetConfig, unet_config
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig, vae_config
from ddpo_jax.types import Model, PyTree

TEXT_PREFIX = "text_model."  # transformers 4 writes it, transformers 5 does not; exports carry it

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


class Pretrained(NamedTuple):
    """Parameters as host arrays: the denoiser in float32, the frozen parts in the compute dtype."""

    text: PyTree
    denoiser: PyTree
    vae: PyTree
    folder: Path


class Configs(NamedTuple):
    text: TextConfig
    unet: UNetConfig
    vae: VAEConfig


def load(
    source: str, *, dtype: DTypeLike, resolution: int | None = None, remat: bool = False
) -> tuple[Model, Pretrained]:
    """The Model and parameters of a diffusers folder (`tiny`, a path or a hub id).

    `dtype` is what the networks compute in; `resolution` is in pixels, the folder's own if None; `remat` recomputes the
    denoiser's blocks in the backward pass.

    Raises:
        UserError: something is missing, broken, or not Stable Diffusion 1.x; the message names the file.
    """
    folder = locate(source)
    configs = read_configs(folder)
    scheduler = process.noise_schedule(read_json(folder / "scheduler" / "scheduler_config.json"))
    model = make_model(configs, process.ddim(scheduler), dtype=dtype, resolution=resolution, remat=remat)
    shapes = parameter_shapes(configs)

    def read(part: str, part_dtype: DTypeLike, prefix: str = "") -> PyTree:
        return read_weights(folder / part / WEIGHTS[part], shapes[part], dtype=part_dtype, prefix=prefix)

    return model, Pretrained(
        text=read("text_encoder", dtype, TEXT_PREFIX),
        denoiser=read("unet", jnp.float32),
        vae=read("vae", dtype),
        folder=folder,
    )


def read_configs(folder: Path) -> Configs:
    """The networks' configurations, read from the folder's own JSON files."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise UserError(f"{folder}/model_index.json: {pipeline!r} is not supported; expected StableDiffusionPipeline")
    fields = {part: read_json(folder / part / "config.json") for part in CLASSES}
    for part, name in CLASSES.items():
        found = fields[part].get("_class_name") or (fields[part].get("architectures") or [name])[0]
        if found != name:
            raise UserError(f"{folder}/{part}/config.json: class {found!r} is not supported; expected {name}")
    try:
        configs = Configs(text_config(fields["text_encoder"]), unet_config(fields["unet"]), vae_config(fields["vae"]))
    except KeyError as error:
        raise UserError(f"{folder}: a config.json lacks the field {error}") from None
    if configs.text.tower.width != configs.unet.cross_attention_dim:
        raise UserError(
            f"{folder}: the text encoder is {configs.text.tower.width} wide and unet/config.json expects"
            f" cross_attention_dim={configs.unet.cross_attention_dim}"
        )
    if {configs.unet.in_channels, configs.unet.out_channels} != {configs.vae.latent_channels}:
        raise UserError(
            f"{folder}: unet/config.json has in_channels={configs.unet.in_channels} and"
            f" out_channels={configs.unet.out_channels}; expected the VAE's latent_channels="
            f"{configs.vae.latent_channels} for both (inpainting and depth models are not supported)"
        )
    return configs


def make_model(
    configs: Configs, noise: process.Process, *, dtype: DTypeLike, resolution: int | None, remat: bool = False
) -> Model:
    """The pure functions of a Stable Diffusion with these configurations."""
    text = CLIPTextModel(configs.text, dtype)
    unet = UNet2DConditionModel(configs.unet, dtype, remat)
    vae = AutoencoderKL(configs.vae, dtype)
    scale = configs.vae.scaling_factor

    def encode_text(params: PyTree, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        return text.apply({"params": params}, tokens)[0]

    def predict(
        params: PyTree, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        return unet.apply({"params": params}, x_t, t, cond).astype(jnp.float32)

    def encode(params: PyTree, images: Float[Array, "b H W 3"], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        mean, log_variance = vae.apply({"params": params}, 2.0 * images - 1.0, method="encode")
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return scale * (mean + jnp.exp(0.5 * log_variance) * eps)

    def decode(params: PyTree, x_0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        pixels = vae.apply({"params": params}, x_0 / scale, method="decode")
        return jnp.clip(0.5 * pixels + 0.5, 0.0, 1.0)

    return Model(encode_text, predict, encode, decode, noise, latent_shape(configs, resolution))


def latent_shape(configs: Configs, resolution: int | None) -> tuple[int, int, int]:
    """(h, w, c) of a latent at a resolution in pixels; the checkpoint's own if None."""
    side, remainder = divmod(resolution or configs.unet.latent_size * configs.vae.reduction, configs.vae.reduction)
    step = 2 ** (len(configs.unet.block_out_channels) - 1)
    if remainder or side % step or side < step:
        multiple = step * configs.vae.reduction
        raise UserError(f"pretrained.resolution={resolution}: expected a positive multiple of {multiple} pixels")
    return side, side, configs.unet.in_channels


def parameter_shapes(configs: Configs) -> dict[str, PyTree]:
    """The parameter trees of the three networks, as shapes."""
    key, t = jax.random.key(0), jnp.zeros(1)
    side = 2 ** (len(configs.unet.block_out_channels) - 1)
    latent = jnp.zeros((1, side, side, configs.unet.in_channels))
    context = jnp.zeros((1, 1, configs.unet.cross_attention_dim))
    pixels = jnp.zeros((1, configs.vae.reduction, configs.vae.reduction, 3))

    def shapes(module, *inputs) -> PyTree:
        return jax.eval_shape(module.init, key, *inputs)["params"]

    return {
        "text_encoder": shapes(CLIPTextModel(configs.text), jnp.zeros((1, configs.text.max_length), jnp.int32)),
        "unet": shapes(UNet2DConditionModel(configs.unet), latent, t, context),
        "vae": shapes(AutoencoderKL(configs.vae), pixels),
    }
