"""From trained parameters to a folder that diffusers opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ddpo_jax.models.folder import WEIGHTS, read_json, write_json, write_tensors, write_weights
from ddpo_jax.models.stable_diffusion import TEXT_PREFIX
from ddpo_jax.types import PyTree

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(source: Path, target: Path, denoiser: PyTree, *, about: Mapping[str, Any]) -> None:
    """Writes `source` with another denoiser to `target`, a diffusers folder with a model card; whole or not at all.

    `about` is told in the card; its entries are JSON values.
    """
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_json(new / "model_index.json", PIPELINE)
    for part in ("unet", "vae"):
        write_json(new / part / "config.json", read_json(source / part / "config.json"))
    write_weights(new / "unet" / WEIGHTS["unet"], denoiser, dtype=np.float32)
    shutil.copy(source / "vae" / WEIGHTS["vae"], new / "vae")
    _write_text_encoder(source / "text_encoder", new / "text_encoder")
    fields = read_json(source / "scheduler" / "scheduler_config.json")
    write_json(new / "scheduler" / "scheduler_config.json", ddim_config(fields))
    _write_tokenizer(source / "tokenizer", new / "tokenizer")
    (new / "README.md").write_text(model_card(about), encoding="utf-8")

    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def model_card(about: Mapping[str, Any]) -> str:
    """The README.md of an exported folder."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [ddpo_jax, text-to-image, stable-diffusion]",
        "---",
        "",
        f"# {about['name']}",
        "",
        f"Fine-tuned from `{about['model']}` with ddpo_jax ({about['algorithm']}).",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "",
        'pipeline = StableDiffusionPipeline.from_pretrained("this folder")',
        f"images = pipeline({about['prompt']!r}, num_inference_steps={about['num_steps']},"
        f" guidance_scale={about['guidance_scale']}, eta={about['eta']}).images",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about["figures"].items()),
        f"| made with | {packages} |",
        "",
        "The licence is that of the model it was fine-tuned from.",
        "",
        "## Config",
        "",
        "```json",
        json.dumps(about["config"], indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def ddim_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The DDIM scheduler that samples as process.py does, from any scheduler's config: nothing is left to a default."""
    kept = {
        name: fields[name]
        for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "steps_offset")
        if name in fields
    }
    return {
        "_class_name": "DDIMScheduler",
        **kept,
        "clip_sample": False,
        "prediction_type": fields.get("prediction_type", "epsilon"),
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": fields.get("set_alpha_to_one", True),
        "thresholding": False,
        "timestep_spacing": fields.get("timestep_spacing", "leading"),
    }


def _write_text_encoder(source: Path, folder: Path) -> None:
    # diffusers loads the other parts in float32 unless told otherwise, transformers in what the config says.
    config = {name: value for name, value in read_json(source / "config.json").items() if name != "dtype"}
    write_json(folder / "config.json", {**config, "torch_dtype": "float32"})
    # With the prefix old and new diffusers load it; without it the old ones keep random weights.
    tensors = load_file(source / WEIGHTS["text_encoder"])
    write_tensors(
        folder / WEIGHTS["text_encoder"],
        {
            TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): tensor
            if np.issubdtype(tensor.dtype, np.integer)
            else tensor.astype(np.float32)
            for name, tensor in tensors.items()
        },
    )


def _write_tokenizer(source: Path, folder: Path) -> None:
    # transformers 5 writes tokenizer.json alone; older ones look for the two files inside it.
    shutil.copytree(source, folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return
    model = read_json(folder / "tokenizer.json")["model"]
    write_json(folder / "vocab.json", model["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    if not (folder / "special_tokens_map.json").exists():
        fields = read_json(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        write_json(folder / "special_tokens_map.json", {name: fields[name] for name in names if name in fields})
