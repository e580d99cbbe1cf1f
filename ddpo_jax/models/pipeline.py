"""What a diffusers folder's JSON files say of its pipeline: networks, tokenizers and noise schedule.

Everything is checked here, before any weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CLIPTokenizer

from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import TextConfig, text_config
from ddpo_jax.models.folder import read_json
from ddpo_jax.models.tokenizer import load_tokenizer
from ddpo_jax.models.unet import NUM_TIME_IDS, UNetConfig, unet_config
from ddpo_jax.models.vae import VAEConfig, vae_config


class Pipeline(NamedTuple):
    """What a diffusers pipeline class is made of, beside a UNet and a VAE."""

    text_encoders: Mapping[str, str]  # folder -> class, in the order in which their contexts are joined
    addition: str | None  # the UNet's addition_embed_type
    mends_scheduler: bool  # whether the class sets steps_offset 1 and clip_sample false, whatever the folder says


PIPELINES = {
    "StableDiffusionPipeline": Pipeline({"text_encoder": "CLIPTextModel"}, None, True),
    "StableDiffusionXLPipeline": Pipeline(
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}, "text_time", False
    ),
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Configs(NamedTuple):
    """What a folder's JSON files say of its networks."""

    pipeline: str  # a key of PIPELINES
    text: dict[str, TextConfig]
    unet: UNetConfig
    vae: VAEConfig
    zero_uncond: bool  # whether guidance leads away from zeros, not from the empty prompt


def read_configs(folder: Path) -> Configs:
    """The networks' configurations, read from the folder's own JSON files.

    Raises:
        UserError: one is missing, or describes another network, or they do not fit together.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise UserError(
            f"{folder}/model_index.json: {name!r} is not supported; expected {' or '.join(PIPELINES)}"
            " (of an inpainting, image-to-image or distilled model, give the base model's folder)"
        )
    pipeline = PIPELINES[name]
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **pipeline.text_encoders}
    fields = {part: read_json(folder / part / "config.json") for part in classes}
    for part, expected in classes.items():
        found = fields[part].get("_class_name") or (fields[part].get("architectures") or [expected])[0]
        if found != expected:
            raise UserError(f"{folder}/{part}/config.json: class {found!r} is not supported; expected {expected}")
    try:
        configs = Configs(
            pipeline=name,
            text={
                part: _of(part, lambda part=part, kind=kind: text_config(fields[part], projects="Projection" in kind))
                for part, kind in pipeline.text_encoders.items()
            },
            unet=_of("unet", lambda: unet_config(fields["unet"])),
            vae=_of("vae", lambda: vae_config(fields["vae"])),
            zero_uncond=pipeline.addition is not None and index.get("force_zeros_for_empty_prompt", True),
        )
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None
    _check_fit(folder, configs)
    return configs


def _of(part: str, parse: Callable) -> Any:
    try:
        return parse()
    except KeyError as error:
        raise UserError(f"{part}/config.json: the field {error} is missing; copy the file anew") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{part}/config.json: a field has a value of another kind ({error})") from None


def read_tokenizers(folder: Path, configs: Configs) -> tuple[CLIPTokenizer, ...]:
    """The tokenizer of each text encoder.

    Raises:
        UserError: one is missing or broken, or makes tokens that its text encoder does not know.
    """
    tokenizers = []
    for part, config in configs.text.items():
        path = folder / TOKENIZERS[part]
        tokenizer = load_tokenizer(path)
        length, vocab_size = tokenizer.model_max_length, len(tokenizer)
        if length > config.max_length or vocab_size > config.vocab_size:
            raise UserError(
                f"{path}: the tokenizer makes up to {length} tokens out of {vocab_size}, but {part}/config.json reads"
                f" {config.max_length} out of {config.vocab_size}; copy the tokenizer anew"
            )
        tokenizers.append(tokenizer)
    if len({tokenizer.model_max_length for tokenizer in tokenizers}) > 1:
        raise UserError(f"{folder}: the tokenizers make different numbers of tokens; copy both folders anew")
    return tuple(tokenizers)


def _check_fit(folder: Path, configs: Configs) -> None:
    """Raises UserError where the networks do not fit together."""
    unet, widths = configs.unet, [config.tower.width for config in configs.text.values()]
    if sum(widths) != unet.cross_attention_dim:
        raise UserError(
            f"{folder}/unet/config.json: cross_attention_dim={unet.cross_attention_dim}; expected the text encoder's"
            f" width, {' + '.join(map(str, widths))}; copy the folders anew from one model"
        )
    if {unet.in_channels, unet.out_channels} != {configs.vae.latent_channels}:
        raise UserError(
            f"{folder}/unet/config.json: in_channels={unet.in_channels} and"
            f" out_channels={unet.out_channels}; expected the VAE's latent_channels="
            f"{configs.vae.latent_channels} for both (inpainting and depth models are not supported)"
        )
    addition = PIPELINES[configs.pipeline].addition
    if (unet.time_id_size is not None) != (addition is not None):
        raise UserError(
            f"{folder}/unet/config.json: {configs.pipeline} expects addition_embed_type={addition!r};"
            " copy it and model_index.json anew from one model"
        )
    if addition:
        pooled = list(configs.text.values())[-1].projection_dim
        expected = pooled + NUM_TIME_IDS * unet.time_id_size
        if unet.added_size != expected:
            raise UserError(
                f"{folder}/unet/config.json: projection_class_embeddings_input_dim={unet.added_size}; expected"
                f" {expected}, {pooled} of the pooled text and {NUM_TIME_IDS} time ids of {unet.time_id_size}"
                " (refiners are not supported)"
            )


def read_schedule(folder: Path, pipeline: str) -> process.NoiseSchedule:
    """The noise schedule of the scheduler that a folder names, whichever it is, as its pipeline class reads it.

    Raises:
        UserError: the file is missing, or DDIM cannot sample what it describes.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return process.noise_schedule(schedule_fields(folder, pipeline))
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def schedule_fields(folder: Path, pipeline: str) -> dict[str, Any]:
    """scheduler_config.json, with what the pipeline class changes in it before it samples."""
    fields = read_json(folder / "scheduler" / "scheduler_config.json")
    # diffusers' StableDiffusionPipeline takes other values for those of folders older than the fields.
    return fields | ({"clip_sample": False, "steps_offset": 1} if PIPELINES[pipeline].mends_scheduler else {})
