"""What a diffusers folder's JSON files say of its pipeline: networks, tokenizers and noise schedule.

Everything is checked here, before any weights are read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CLIPTokenizer

from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import TextConfig, text_config
from ddpo_jax.models.folder import parsed, read_json
from ddpo_jax.models.tokenizer import check_tokenizer, load_tokenizer
from ddpo_jax.models.unet_config import NUM_TIME_IDS, UNetConfig, unet_config
from ddpo_jax.models.vae import VAEConfig, vae_config


class Pipeline(NamedTuple):
    """What a diffusers pipeline class is made of, beside a UNet and a VAE."""

    text_encoders: Mapping[str, str]  # folder -> class, in the order in which their contexts are joined
    addition: str | None  # the UNet's addition_embed_type
    mends_old_folders: bool  # whether diffusers' class changes fields of configs that older versions of it wrote


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
    if str(index.get("_class_name")) not in PIPELINES:
        raise UserError(
            f"{folder}/model_index.json: {index.get('_class_name')!r} is not supported; expected"
            f" {' or '.join(PIPELINES)} (of an inpainting, image-to-image or distilled model, give the base model's"
            " folder)"
        )
    fields = {part: read_json(folder / part / "config.json") for part in classes(index)}
    for part, expected in classes(index).items():
        named = fields[part].get("_class_name") or fields[part].get("architectures") or expected
        found = named[0] if isinstance(named, list) else named
        if found != expected:
            raise UserError(
                f"{folder}/{part}/config.json: class {found!r} is not supported; expected {expected}, of a Stable"
                " Diffusion 1.x, 2.x or XL base model"
            )
    configs = parse_configs(index, fields, folder=folder)
    _check_fit(folder, configs)
    return configs


def classes(index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each network of a parsed model_index.json, by its folder."""
    text = PIPELINES[index["_class_name"]].text_encoders
    return {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **text}


def parse_configs(
    index: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]], *, folder: Path = Path()
) -> Configs:
    """The configurations of a parsed model_index.json and the parsed config.json of each part. `folder` is for errors.

    Raises:
        UserError: one describes another network.
    """
    pipeline = PIPELINES[index["_class_name"]]

    def of(part: str, parse: Callable) -> Any:
        return parsed(folder / part / "config.json", parse, fields[part])

    unet = of("unet", unet_config)
    if pipeline.mends_old_folders and unet.latent_size < 64 and _version(fields["unet"]) < (0, 9):
        unet = unet._replace(latent_size=64)
    return Configs(
        pipeline=index["_class_name"],
        text={
            part: of(part, partial(text_config, projects="Projection" in kind))
            for part, kind in pipeline.text_encoders.items()
        },
        unet=unet,
        vae=of("vae", vae_config),
        zero_uncond=pipeline.addition is not None and index.get("force_zeros_for_empty_prompt", True),
    )


def _version(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """(major, minor) of the diffusers that wrote a config; that of today if it does not say."""
    numbers = re.match(r"(\d+)\.(\d+)", str(fields.get("_diffusers_version")))
    return tuple(map(int, numbers.groups())) if numbers else (sys.maxsize,)


def read_tokenizers(folder: Path, configs: Configs) -> tuple[CLIPTokenizer, ...]:
    """The tokenizer of each text encoder.

    Raises:
        UserError: one is missing or broken, or makes tokens that its text encoder does not know.
    """
    tokenizers = []
    for part, config in configs.text.items():
        path = folder / TOKENIZERS[part]
        tokenizer = load_tokenizer(path)
        check_tokenizer(tokenizer, path, f"{part}/config.json", config.max_length, config.vocab_size)
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
    return parsed(path, process.noise_schedule, schedule_fields(folder, pipeline))


def schedule_fields(folder: Path, pipeline: str) -> dict[str, Any]:
    """scheduler_config.json, with what the pipeline class changes in it before it samples."""
    fields = read_json(folder / "scheduler" / "scheduler_config.json")
    # diffusers' StableDiffusionPipeline sets these two whatever the folder says: in old ones they are wrong.
    return fields | ({"clip_sample": False, "steps_offset": 1} if PIPELINES[pipeline].mends_old_folders else {})
