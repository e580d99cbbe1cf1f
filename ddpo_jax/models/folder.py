"""Files of a model folder: JSON, and safetensors to and from Flax trees. Pickles are never opened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ddpo_jax import convert
from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree

ASSETS = Path(__file__).parents[1] / "assets"
TINY, TINY_CLIP = ASSETS / "tiny-sd", ASSETS / "tiny-clip"

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
WEIGHTS = {part: f"{stem}.safetensors" for part, stem in STEMS.items()}
CLIP_FILES = ("*.json", "merges.txt", "model.safetensors", "model-?????-of-?????.safetensors")

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names
MAPPED_BYTES = 2**27  # of a file that are in memory at a time, so that a large file does not fill it


def pipeline_files(variant: str = "") -> tuple[str, ...]:
    """What is asked of the hub for a pipeline: safetensors of this variant, JSON and tokenizer files only."""
    dot = f".{variant}" if variant else ""
    weights = (
        f"{part}/{stem}{name}.safetensors"
        for part, stem in STEMS.items()
        for name in (dot, f"{dot}-?????-of-?????", f"-?????-of-?????{dot}")
    )
    return ("*.json", "*/*.json", "*/merges.txt", *dict.fromkeys(weights))


def locate(
    source: str,
    *,
    field: str = "pretrained.model",
    tiny: Path = TINY,
    hub_files: Sequence[str] = pipeline_files(),
    revision: str = "",
) -> Path:
    """The local folder of a model: `tiny`, a path, or a hub id. `field` is the config's, for errors.

    revision: a branch, tag or commit of the hub; "" is its newest.

    Raises:
        UserError: there is no such folder, and the hub has none either.
    """
    if source == "tiny":
        return tiny
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{field}={source!r} is a file; {_how_to_convert(path)}")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{field}={source!r}: no such folder; expected a model folder, a hub id or 'tiny'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision or None, allow_patterns=list(hub_files)))
    except Exception as error:  # huggingface_hub raises many unrelated types for "not reachable" and "not there"
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{field}={source!r}: no such folder, and the hub did not give it{at} ({error});"
            " download it first and give the folder"
        ) from error


def _how_to_convert(path: Path) -> str:
    if path.suffix == ".safetensors":
        return (
            "expected a diffusers folder. Convert it once, where torch is installed:"
            f" diffusers.StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained(FOLDER),"
            " with StableDiffusionXLPipeline for an XL model, and give FOLDER"
        )
    if path.suffix in PICKLES:
        return (
            "a pickle, which can run code when it is read, and is never opened. Convert it where you trust it, to a"
            " diffusers folder in safetensors (save_pretrained with safe_serialization=True), and give the folder"
        )
    return "expected a model folder, a hub id or 'tiny'"


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


def weight_files(folder: Path, stem: str, variant: str = "") -> tuple[Path, ...]:
    """The safetensors files of a part: one, or the shards that an index names.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    dot = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{dot}.safetensors", folder / f"{stem}.safetensors.index{dot}.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise UserError(f"{single}: no such file{_what_is_there(folder, stem, variant)}")
    shards = read_json(index).get("weight_map")
    names = sorted(set(shards.values())) if isinstance(shards, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index}: expected a weight_map from tensors to files beside it; copy or download it again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder / missing[0]}: no such file, and {index.name} names it; copy or download the folder again"
        )
    return tuple(folder / name for name in names)


def _what_is_there(folder: Path, stem: str, variant: str) -> str:
    names = sorted(path.name for path in folder.glob("*"))
    pattern = re.compile(rf"{stem}(?:\.safetensors\.index)?(?:\.([\w-]+))?\.(?:safetensors|json)")
    variants = {found[1] or "" for name in names if (found := pattern.fullmatch(name))} - {variant}
    if variants:
        return f"; there is another: set pretrained.variant={min(variants)!r}"
    pickles = [name for name in names if name.endswith(PICKLES)]
    reason = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
    return f"{reason}; save the model with safe_serialization=True"


class _Tensor(NamedTuple):
    file: Path
    name: str  # there
    shape: tuple[int, ...]


def on_first_device(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.devices()[0])


def on_host(array: np.ndarray) -> np.ndarray:
    return array


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of safetensors files as they are, by name."""
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def read_weights(files: Sequence[Path], like: PyTree, *, prefix: str = "", put: Callable = on_first_device) -> PyTree:
    """Arrays with the structure, shapes and dtypes of `like`, out of safetensors files, each placed by `put`.

    One tensor is read, turned, cast and placed at a time: beyond the finished arrays, the host holds two of the largest
    tensor and MAPPED_BYTES of a file. A leading `prefix` of names is passed over.

    Raises:
        UserError: a file is truncated, holds other tensors than the network, or a value is not finite.
    """
    return _place(_find(files, like, prefix), like, put)


def check_weights(files: Sequence[Path], like: PyTree, *, prefix: str = "") -> None:
    """Raises what `read_weights` would of names and shapes, without reading a tensor."""
    _find(files, like, prefix)


def _find(files: Sequence[Path], like: PyTree, prefix: str) -> list[tuple[_Tensor, Callable]]:
    """For each leaf of `like` its tensor, and what turns it."""
    tensors: dict[str, _Tensor] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                known = name.removeprefix(prefix)
                if known in tensors:
                    raise UserError(f"{path}: tensor {name!r} is in {tensors[known].file.name} too; expected it once")
                if part.get_dtype() not in FLOATS and not convert.IGNORED.search(name):
                    raise UserError(
                        f"{path}: tensor {name!r} is stored as {part.get_dtype()}; expected one of {', '.join(FLOATS)}"
                        " (quantised models are not read)"
                    )
                tensors[known] = _Tensor(path, name, tuple(part.get_shape()))
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
    stored = convert.match({name: tensor.shape for name, tensor in tensors.items()}, like, source=source)
    leaves = jax.tree.leaves(stored, is_leaf=convert.is_stored)
    return [(tensors[leaf.name], leaf.to_flax) for leaf in leaves]


def _place(found: list[tuple[_Tensor, Callable]], like: PyTree, put: Callable) -> PyTree:
    templates, tree = jax.tree.flatten(like)
    arrays: list[Any] = [None] * len(templates)
    read = 0

    def portion(i: int) -> tuple[Path, int]:
        nonlocal read
        read += int(np.prod(found[i][0].shape)) * 4
        return found[i][0].file, read // MAPPED_BYTES

    # In the order of the files; a file is opened anew for each portion, and so let go of.
    order = sorted(range(len(found)), key=lambda i: found[i][0].file)
    for (path, _), portion_of in groupby(order, portion):
        with _opened(path) as file:
            for i in portion_of:
                tensor, turn = found[i]
                array = file.get_tensor(tensor.name)
                if not np.isfinite(array).all():
                    raise UserError(
                        f"{path}: tensor {tensor.name!r} holds values that are not finite; copy or download it again,"
                        " or save the model from sound weights"
                    )
                arrays[i] = put(np.asarray(turn(array), templates[i].dtype, order="C"))
                jax.block_until_ready(arrays[i])  # a copy that is under way would keep the host's alive
    return jax.tree.unflatten(tree, arrays)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def write_weights(
    path: Path, tree: PyTree, *, dtype: DTypeLike, rename: Callable[[str], str] = lambda name: name
) -> None:
    """Writes a Flax tree as a safetensors file that torch opens, its torch names changed by `rename`.

    Raises:
        UserError: a value is too large for `dtype`.
    """
    tensors = convert.to_torch(tree).items()
    write_tensors(path, {rename(name): cast(tensor, dtype, f"{path}: {name}") for name, tensor in tensors})


def cast(tensor: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """The tensor in `dtype`; not a copy if it is.

    Raises:
        UserError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        found = tensor.astype(dtype, copy=False)
    if found is not tensor and not np.isfinite(found).all():
        raise UserError(f"{name} holds values too large for {np.dtype(dtype)}; write it in float32 or bfloat16")
    return found


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes torch-named tensors as a safetensors file that torch opens, readable by all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives it to its owner alone


def write_json(path: Path, fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
