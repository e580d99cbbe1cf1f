"""Stable Diffusion 1.x, 2.x and XL from a diffusers folder: a Model of pure functions and its parameters."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key
from transformers import CLIPTokenizer

from ddpo_jax import process
from ddpo_jax.convert import leaf_path
from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import CLIPTextModel
from ddpo_jax.models.folder import (
    STEMS,
    check_weights,
    read_weights,
    weight_files,
)
from ddpo_jax.models.kernels import Kernels, choose_kernels
from ddpo_jax.models.locate import locate_pipeline
from ddpo_jax.models.pipeline import Configs, read_configs, read_schedule, read_tokenizers
from ddpo_jax.models.tokenizer import tokenize_all
from ddpo_jax.models.unet import REMAT, UNet2DConditionModel
from ddpo_jax.models.unet_config import NUM_TIME_IDS
from ddpo_jax.models.vae import AutoencoderKL
from ddpo_jax.sharding import first_device
from ddpo_jax.types import Condition, Frozen, Model, Posterior, PyTree

TEXT_PREFIX = "text_model."  # transformers 4 writes it everywhere, transformers 5 only beside a projection


class Source(NamedTuple):
    """Where a model was read from."""

    folder: Path
    variant: str


class Pretrained(NamedTuple):
    """Parameters on the devices, stored as `storage` says."""

    text: dict[str, PyTree]  # one tree a text encoder, by its folder's name
    denoiser: PyTree
    vae: PyTree
    tokenizers: tuple[CLIPTokenizer, ...]  # one a text encoder
    source: Source


def nothing(path: str) -> bool:
    return False


def load(
    model: str,
    *,
    dtype: DTypeLike,
    resolution: int | None = None,
    remat: str = "none",
    attention: str = "auto",
    convolution: str = "auto",
    variant: str = "",
    revision: str = "",
    exact: Callable[[str], bool] = nothing,
    place: Callable = first_device,
) -> tuple[Model, Pretrained]:
    """The Model and parameters of a diffusers folder (`tiny`, a path or a hub id).

    dtype: what the networks compute in. The VAE computes in float32 where its config asks for it (`force_upcast`).
    resolution: pixels, one side; the folder's own if None.
    remat: what the denoiser's backward pass keeps, one of unet.REMAT.
    attention, convolution: as in `Kernels`, or "auto".
    variant: of the weights, such as "fp16".  revision: of a hub id.
    exact: the denoiser's parameters, by path, that are stored in float32 whatever `dtype` is.
    place: tree of shapes -> tree of shardings; the first device by default.

    Raises:
        UserError: something is missing, broken, or not Stable Diffusion; the message names the file.
    """
    if remat not in REMAT:
        raise UserError(f"train.remat={remat!r}: expected one of {', '.join(REMAT)}")
    folder = locate_pipeline(model, variant=variant, revision=revision)
    configs = read_configs(folder)
    noise = process.ddim(read_schedule(folder, configs.pipeline))
    kernels = choose_kernels(attention, convolution, dtype=dtype)
    functions = make_model(configs, noise, dtype=dtype, resolution=resolution, remat=remat, kernels=kernels)
    tokenizers = read_tokenizers(folder, configs)
    like = stored(configs, dtype, exact=exact)
    files = {part: weight_files(folder / part, STEMS[part], variant) for part in like}
    if variant and not any(f".{variant}" in path.name for paths in files.values() for path in paths):
        raise UserError(f"pretrained.variant={variant!r}: no file of {folder} is of it; set another, or ''")
    prefixes = {part: TEXT_PREFIX if part in configs.text else "" for part in like}
    for part in like:  # of all, before gigabytes of the first are read
        check_weights(files[part], like[part], prefix=prefixes[part])
    params = {part: read_weights(files[part], like[part], prefix=prefixes[part], place=place) for part in like}
    return functions, Pretrained(
        text={part: params[part] for part in configs.text},
        denoiser=params["unet"],
        vae=params["vae"],
        tokenizers=tokenizers,
        source=Source(folder, variant),
    )


def freeze(model: Model, pretrained: Pretrained, *, reward: PyTree = ()) -> Frozen:
    """All that training reads and never changes; `reward` are the reward's parameters."""
    empty = jnp.asarray(tokenize_all(pretrained.tokenizers, [""]))
    uncond = jax.jit(model.encode_empty)(pretrained.text, empty)
    return Frozen(pretrained.text, pretrained.denoiser, pretrained.vae, uncond, reward)


def read_denoiser(source: Source) -> PyTree:
    """The denoiser's parameters as they are in the files, in float32 on the host."""
    shapes = denoiser_shapes(source)
    return read_weights(weight_files(source.folder / "unet", STEMS["unet"], source.variant), shapes, place=None)


def identify_encoder(source: Source, dtype: DTypeLike) -> dict[str, Any]:
    """What tells this model's VAE, computing in `dtype`, from another, as JSON values."""
    configs, content = read_configs(source.folder), hashlib.sha256()
    for path in weight_files(source.folder / "vae", STEMS["vae"], source.variant):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "vae": content.hexdigest(),
        "vae config": str(configs.vae),
        "compute_dtype": jnp.dtype(vae_dtype(configs, dtype)).name,
    }


def denoiser_shapes(source: Source) -> PyTree:
    """The denoiser's parameters, as float32 shapes."""
    return parameter_shapes(read_configs(source.folder))["unet"]


def make_model(
    configs: Configs,
    noise: process.Process,
    *,
    dtype: DTypeLike,
    resolution: int | None,
    remat: str = "none",
    kernels: Kernels = Kernels(),  # noqa: B008
) -> Model:
    """The pure functions of a Stable Diffusion with these configurations."""
    encoders = {part: _function(CLIPTextModel(config, dtype)) for part, config in configs.text.items()}
    unet = _function(UNet2DConditionModel(configs.unet, dtype, remat, kernels))
    vae = AutoencoderKL(configs.vae, vae_dtype(configs, dtype), kernels.convolution)
    vae_encode, vae_decode = _function(vae, "encode"), _function(vae, "decode")
    scale = configs.vae.scaling_factor
    shape = latent_shape(configs, resolution)
    side = shape[0] * configs.vae.reduction

    def encode_text(params: PyTree, tokens: Int[Array, "b s"]) -> Condition:
        parts = jnp.split(tokens, len(encoders), axis=1)
        states = [encoder(params[part], own) for (part, encoder), own in zip(encoders.items(), parts, strict=True)]
        if configs.unet.time_id_size is None:
            return Condition(states[0].last)
        # Micro-conditioning: a picture that was neither resized nor cropped (Podell et al. 2023, Sec. 2.2).
        time_ids = jnp.array([side, side, 0, 0, side, side], jnp.float32)
        context = jnp.concatenate([state.penultimate for state in states], axis=-1)
        return Condition(context, states[-1].pooled, jnp.broadcast_to(time_ids, (len(tokens), NUM_TIME_IDS)))

    def encode_empty(params: PyTree, tokens: Int[Array, "1 s"]) -> Condition:
        cond = encode_text(params, tokens)
        if not configs.zero_uncond:
            return cond
        return cond._replace(context=jnp.zeros_like(cond.context), pooled=jnp.zeros_like(cond.pooled))

    def predict(
        params: PyTree, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Condition
    ) -> Float[Array, "b h w c"]:
        return unet(params, x_t, t, *cond).astype(jnp.float32)

    def predict_each(
        params: PyTree, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], conds: Sequence[Condition]
    ) -> list[Float[Array, "b h w c"]]:
        several = (None if parts[0] is None else parts for parts in zip(*conds, strict=True))
        out = unet(params, x_t, t, *several).astype(jnp.float32)
        return list(jnp.moveaxis(out.reshape(len(x_t), len(conds), *out.shape[1:]), 1, 0))

    def encode(params: PyTree, images: Float[Array, "b H W 3"]) -> Posterior:
        return Posterior(*vae_encode(params, 2.0 * images - 1.0))

    def sample_latent(posterior: Posterior, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        eps = jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)
        return scale * (posterior.mean + jnp.exp(0.5 * posterior.log_variance) * eps)

    def decode(params: PyTree, x_0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        pixels = vae_decode(params, x_0 / scale)
        return jnp.clip(0.5 * pixels + 0.5, 0.0, 1.0)

    return Model(encode_text, encode_empty, predict, encode, sample_latent, decode, noise, shape, predict_each)


@functools.cache
def _function(module: nn.Module, method: str | None = None) -> Callable:
    """params, *inputs -> the module's output; traced once for inputs of the same shapes, whatever programs call it."""

    def apply(params: PyTree, *inputs: PyTree) -> PyTree:
        return module.apply({"params": params}, *inputs, method=method)

    return jax.jit(apply, inline=True)


def latent_shape(configs: Configs, resolution: int | None) -> tuple[int, int, int]:
    """(h, w, c) of a latent at a resolution in pixels; the checkpoint's own if None."""
    side, remainder = divmod(resolution or configs.unet.latent_size * configs.vae.reduction, configs.vae.reduction)
    step = 2 ** (len(configs.unet.block_out_channels) - 1)
    if remainder or side % step or side < step:
        multiple = step * configs.vae.reduction
        raise UserError(f"pretrained.resolution={resolution}: expected a positive multiple of {multiple} pixels")
    return side, side, configs.unet.in_channels


def parameter_shapes(configs: Configs) -> dict[str, PyTree]:
    """The parameter trees of the networks, as float32 shapes, by the name of their folder."""
    unet = configs.unet
    side = 2 ** (len(unet.block_out_channels) - 1)
    cond = Condition((1, 1, unet.cross_attention_dim))
    if unet.time_id_size is not None:
        cond = cond._replace(pooled=(1, unet.added_size - NUM_TIME_IDS * unet.time_id_size), time_ids=(1, NUM_TIME_IDS))
    conditions = (shape for shape in cond if shape is not None)
    return {
        **{
            part: _parameter_shapes(CLIPTextModel(config), (1, config.max_length), dtype=jnp.int32)
            for part, config in configs.text.items()
        },
        "unet": _parameter_shapes(UNet2DConditionModel(unet), (1, side, side, unet.in_channels), (1,), *conditions),
        "vae": _parameter_shapes(AutoencoderKL(configs.vae), (1, configs.vae.reduction, configs.vae.reduction, 3)),
    }


@functools.cache  # of SD 1.5 it takes seconds, and is wanted several times
def _parameter_shapes(module: nn.Module, *inputs: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> PyTree:
    shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in inputs)
    return jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"]


def vae_dtype(configs: Configs, dtype: DTypeLike) -> DTypeLike:
    """What the VAE computes in where the rest computes in `dtype`."""
    return jnp.float32 if configs.vae.force_upcast else dtype


def stored(configs: Configs, dtype: DTypeLike, *, exact: Callable[[str], bool] = nothing) -> dict[str, PyTree]:
    """The parameter trees of the networks, as shapes in the dtypes that they are kept in, by their folder's name."""
    shapes = parameter_shapes(configs)
    return {
        **{part: storage(shapes[part], dtype) for part in configs.text},
        "unet": storage(shapes["unet"], dtype, exact=exact),
        "vae": storage(shapes["vae"], vae_dtype(configs, dtype)),
    }


def storage(shapes: PyTree, dtype: DTypeLike, *, exact: Callable[[str], bool] = nothing) -> PyTree:
    """`shapes` in the dtypes that parameters are kept in: kernels and embeddings in `dtype`, all else in float32.

    A network multiplies by its kernels in `dtype` wherever they come from, so that this loses nothing; the scales and
    shifts of norms are applied in float32, and are small. `exact` names kernels to keep in float32, by their path:
    those that something small is added to.
    """

    def kept_as(path, leaf):
        kept = len(leaf.shape) < 2 or exact("/".join(leaf_path(path)))
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if kept else dtype)

    return jax.tree_util.tree_map_with_path(kept_as, shapes)


def text_name(name: str) -> str:
    """The name of a text encoder's tensor that old and new diffusers load."""
    return name if name.startswith("text_projection") else TEXT_PREFIX + name
