"""Files of a model folder: JSON, and safetensors to and from Flax trees. Pickles are never opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ddpo_jax import convert
from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree

ASSETS = Path(__file__).parents[1] / "assets"
TINY, TINY_CLIP = ASSETS / "tiny-sd", ASSETS / "tiny-clip"

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# What is asked of the hub: safetensors, JSON and tokenizer files only.
PIPELINE_FILES = ("*.json", "*/*.json", "*/merges.txt", *(f"{part}/{file}" for part, file in WEIGHTS.items()))
CLIP_FILES = ("*.json", "merges.txt", "model.safetensors")


def locate(
    source: str, *, field: str = "pretrained.model", tiny: Path = TINY, hub_files: Sequence[str] = PIPELINE_FILES
) -> Path:
    """The local folder of a model: `tiny`, a path, or a hub id. `field` is the config's, for errors.

    Raises:
        UserError: there is no such folder, and the hub has none either.
    """
    if source == "tiny":
        return tiny
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{field}={source!r} is a file; expected a model folder, a hub id or 'tiny'")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{field}={source!r}: no such folder; expected a model folder, a hub id or 'tiny'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(hub_files)))
    except Exception as error:  # huggingface_hub raises many unrelated types for "not reachable" and "not there"
        raise UserError(
            f"{field}={source!r}: no such folder, and the hub did not give it ({error});"
            " download it first and give the folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a whole model folder holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def read_weights(path: Path, like: PyTree, *, dtype: DTypeLike, prefix: str = "") -> PyTree:
    """The Flax tree with the structure of `like` stored in a safetensors file, cast to `dtype`.

    Raises:
        UserError: the file is missing, truncated, holds other tensors than the network, or a value is not finite.
    """
    if not path.is_file():
        pickles = [*path.parent.glob("*.bin"), *path.parent.glob("*.ckpt"), *path.parent.glob("*.pt")]
        reason = f"; {pickles[0].name} is a pickle, which can run code and is never opened" if pickles else ""
        variants = sorted(other.name for other in path.parent.glob("*.safetensors"))
        reason += f"; {', '.join(variants)} is there, but variants and shards are not read" if variants else ""
        raise UserError(f"{path}: no such file{reason}; save the model with safe_serialization=True")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    tree = convert.from_torch(convert.without_prefix(tensors, prefix), like, source=str(path))
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name!r} holds values that are not finite")
    return convert.cast(tree, dtype)


def write_weights(path: Path, tree: PyTree, *, dtype: DTypeLike, prefix: str = "") -> None:
    """Writes a Flax tree as a safetensors file that torch opens."""
    tensors = convert.to_torch(convert.cast(tree, dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {prefix + name: tensor for name, tensor in tensors.items()})


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes torch-named tensors as a safetensors file that torch opens, readable by all."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives it to its owner alone


def write_json(path: Path, fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
