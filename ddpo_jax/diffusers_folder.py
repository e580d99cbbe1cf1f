"""From trained parameters to a folder that diffusers opens."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ddpo_jax import convert, process
from ddpo_jax.errors import UserError
from ddpo_jax.models.folder import (
    STEMS,
    WEIGHTS,
    cast,
    check_weights,
    read_json,
    read_weights,
    weight_files,
    write_json,
    write_tensors,
    write_weights,
)
from ddpo_jax.models.pipeline import PIPELINES, TOKENIZERS, read_configs, schedule_fields
from ddpo_jax.models.stable_diffusion import TEXT_PREFIX, Source, parameter_shapes, text_name
from ddpo_jax.types import PyTree

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
MERGED = (
    f"The adapters that were trained are merged into these weights already. `{LORA_WEIGHTS}` is for the model named"
    " above: loaded into this folder's, it would count twice."
)
WRITTEN = {  # all that an export may hold
    *("README.md", "model_index.json", "scheduler", LORA_WEIGHTS),
    *STEMS,
    *TOKENIZERS.values(),
}
MARK = "ddpo_jax"  # in the card of every folder that is written here


def export(
    source: Source,
    target: Path,
    denoiser: PyTree,
    *,
    about: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
    adapters: Mapping[str, tuple] | None = None,
) -> None:
    """Writes `source` with another denoiser to `target`, a diffusers folder with a model card; whole or not at all.

    about: what the card tells; its entries are JSON values.
    dtype: what all weights are stored in. diffusers computes in float32 whatever it is, unless told otherwise.
    adapters: Finetune.adapters' of the training; they are also written by themselves, for `load_lora_weights`.

    Raises:
        UserError: `target` holds something else, a part of `source` is broken, or a weight is too large for `dtype`.
    """
    check_target(source, target)
    target = target.resolve()  # what a link leads to
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = f".{target.name}.{MARK}-"
    for left in target.parent.glob(f"{glob.escape(scratch)}*"):  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=scratch, dir=target.parent) as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        write(source, new, denoiser, about=about, dtype=dtype, adapters=adapters)
        if target.exists():
            target.rename(old)
        new.rename(target)


def write(
    source: Source,
    new: Path,
    denoiser: PyTree,
    *,
    about: Mapping[str, Any],
    dtype: DTypeLike,
    adapters: Mapping[str, tuple] | None,
) -> None:
    """What `export` writes, into the folder `new`."""
    configs = read_configs(source.folder)
    shapes = parameter_shapes(configs)
    others = {part: shapes[part] for part in ("vae", *configs.text)}
    prefixes = {part: TEXT_PREFIX if part in configs.text else "" for part in others}
    files = {part: weight_files(source.folder / part, STEMS[part], source.variant) for part in others}
    for part, like in others.items():  # before gigabytes are written
        check_weights(files[part], like, prefix=prefixes[part])
    write_json(new / "model_index.json", model_index(configs.pipeline, zero_uncond=configs.zero_uncond))
    write_config(source.folder, new, "unet")
    write_weights(new / "unet" / WEIGHTS["unet"], denoiser, dtype=dtype)
    for part, like in others.items():
        params = read_weights(files[part], like, prefix=prefixes[part], place=None)
        if part in configs.text:
            # With the prefix old and new diffusers load it; without it the old ones keep random weights.
            # transformers loads in what the config says, where diffusers loads in float32 unless told otherwise.
            write_config(source.folder, new, part, torch_dtype="float32")
            write_weights(new / part / WEIGHTS[part], params, dtype=dtype, rename=text_name)
        else:
            write_config(source.folder, new, part)
            write_weights(new / part / WEIGHTS[part], params, dtype=dtype)
    for part in configs.text:
        _write_tokenizer(source.folder / TOKENIZERS[part], new / TOKENIZERS[part])
    fields = schedule_fields(source.folder, configs.pipeline)
    write_json(new / "scheduler" / "scheduler_config.json", ddim_config(fields))
    if adapters:
        tensors = convert.adapters_to_torch(adapters, prefix="unet.").items()
        write_tensors(new / LORA_WEIGHTS, {name: cast(tensor, dtype, name) for name, tensor in tensors})
    card = model_card({**about, "pipeline": configs.pipeline, "adapters": bool(adapters)})
    (new / "README.md").write_text(card, encoding="utf-8")


def check_target(source: Source, target: Path) -> None:
    """Raises UserError if something is at `target` that an export may not replace."""
    nearest = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{target}: {nearest} is no folder that can be written to; give another to export to")
    if not target.exists() or not any(target.iterdir()):
        return
    card = target / "README.md"
    others = sorted({path.name for path in target.iterdir()} - WRITTEN)
    is_export = card.is_file() and f"tags: [{MARK}," in card.read_text("utf-8", errors="replace")
    if others or not is_export or target.resolve() == source.folder.resolve():
        what = f"other files, such as {others[0]}," if others else "a model that no export wrote,"
        raise UserError(f"{target} holds {what} which an export would replace; give a new folder")


def model_index(pipeline: str, *, zero_uncond: bool = True) -> dict[str, Any]:
    """model_index.json: the pipeline class and the class of each part.

    zero_uncond: force_zeros_for_empty_prompt of the XL pipeline.
    """
    text = PIPELINES[pipeline].text_encoders
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{part: ["transformers", kind] for part, kind in text.items()},
        **{TOKENIZERS[part]: ["transformers", "CLIPTokenizer"] for part in text},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if PIPELINES[pipeline].addition:
        return index | {"force_zeros_for_empty_prompt": zero_uncond}
    return index | {"requires_safety_checker": False, "safety_checker": [None, None]}


def write_config(source: Path, target: Path, part: str, **changes: Any) -> None:
    """Copies a part's config.json, without what it says of where it came from."""
    fields = read_json(source / part / "config.json")
    told = {name: value for name, value in fields.items() if name not in ("_name_or_path", "dtype", "torch_dtype")}
    write_json(target / part / "config.json", told | changes)


def model_card(about: Mapping[str, Any]) -> str:
    """The README.md of an exported folder."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [{MARK}, text-to-image, stable-diffusion]",
        "---",
        "",
        f"# {about['name']}",
        "",
        f"Fine-tuned from `{about['model']}` with ddpo_jax ({about['algorithm']}).",
        "",
        "```python",
        f"from diffusers import {about['pipeline']}",
        "",
        f'pipeline = {about["pipeline"]}.from_pretrained("this folder")',
        f"images = pipeline({about['prompt']!r}, num_inference_steps={about['num_steps']},"
        f" guidance_scale={about['guidance_scale']}, eta={about['eta']}).images",
        "```",
        "",
        *([MERGED, ""] if about.get("adapters") else []),
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
    schedule = process.noise_schedule(fields)
    kept = {
        name: fields[name]
        for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "steps_offset")
        if name in fields
    }
    return {
        "_class_name": "DDIMScheduler",
        **kept,
        "clip_sample": schedule.clip_range is not None,
        "clip_sample_range": schedule.clip_range or 1.0,
        "prediction_type": fields.get("prediction_type", "epsilon"),
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": fields.get("set_alpha_to_one", True),
        "thresholding": False,
        "timestep_spacing": fields.get("timestep_spacing", "leading"),
    }


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
