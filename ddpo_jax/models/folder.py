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
from ddpo_jax.sharding import first_device, put
from ddpo_jax.types import PyTree

ASSETS = Path(__file__).parents[1] / "assets"

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
WEIGHTS = {part: f"{stem}.safetensors" for part, stem in STEMS.items()}

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names
MAPPED_BYTES = 2**27  # of a file that are in memory at a time, so that a large file does not fill it


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; expected a file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a whole model folder holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def parsed(path: Path, parse: Callable, fields: Mapping[str, Any]) -> Any:
    """parse(fields), of the JSON file at `path`.

    Raises:
        UserError: it cannot be; the message names the file.
    """
    try:
        return parse(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: the field {error} is missing; copy the file anew") from None
    except Exception as error:  # whatever a value of the wrong kind leads to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: a field has a value of another kind ({reason}); copy the file anew") from None


def weight_files(folder: Path, stem: str, variant: str | None = "") -> tuple[Path, ...]:
    """The safetensors files of a part: the shards that an index names, or one.

    variant: such as "fp16"; a part that does not have it gives its plain files, as in diffusers. None: this model is
    of those that come in one variant only.

    Raises:
        UserError: they are not there; pickles are never opened.
    """
    names = sorted(path.name for path in folder.glob("*"))
    found = next(filter(None, (stored_as(names, stem, suffix) for suffix in dict.fromkeys((variant or "", "")))), None)
    if found is None:
        raise UserError(f"{folder / stem}.safetensors: no such file{missing(names, stem, variant is not None)}")
    if not found.endswith(".json"):
        return (folder / found,)
    shards = read_json(folder / found).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(
            f"{folder / found}: expected a weight_map from tensors to files beside it; copy or download it again"
        )
    names = sorted(set(names))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder / absent[0]}: no such file, and {found} names it; copy or download the folder again")
    return tuple(folder / name for name in names)


def stored_as(names: Sequence[str], stem: str, variant: str) -> str | None:
    """The index or the safetensors file of a variant among a folder's files; the index first, as in diffusers."""
    dot = f".{variant}" if variant else ""
    known = (f"{stem}.safetensors.index{dot}.json", f"{stem}{dot}.safetensors")
    return next((name for name in known if name in names), None)


def missing(names: Sequence[str], stem: str, settable: bool = True) -> str:
    """What to tell of a folder with these files that lacks its weights. settable: whether a variant can be set."""
    pattern = re.compile(rf"{stem}(?:\.safetensors\.index)?\.([\w-]+)\.(?:safetensors|json)")
    variants = {match[1] for name in names if (match := pattern.fullmatch(name))}
    if variants and settable:
        return f"; there is another: set pretrained.variant={min(variants)!r}"
    pickles = [name for name in names if name.endswith(PICKLES)]
    reason = f"; {min(pickles)} is a pickle, which can run code and is never opened" if pickles else ""
    return f"{reason}; copy or download the folder again, or save the model anew with safe_serialization=True"


class _Tensor(NamedTuple):
    file: Path
    name: str  # there
    shape: tuple[int, ...]


def read_tensors(files: Sequence[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of safetensors files as they are, by name."""
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def _nothing(name: str) -> bool:
    return False


def read_weights(
    files: Sequence[Path],
    like: PyTree,
    *,
    prefix: str = "",
    passed_over: Callable[[str], bool] = _nothing,
    place: Callable | None = first_device,
) -> PyTree:
    """Arrays with the structure, shapes and dtypes of `like`, out of safetensors files.

    place: tree of shapes -> tree of shardings, as Layout.parameters; the first device by default. None: numpy arrays.
    One tensor is read, turned, cast and placed at a time: beyond the finished arrays, the host holds two of the largest
    tensor and MAPPED_BYTES of a file. A leading `prefix` of names is passed over, and then the tensors whose name
    `passed_over` is true of.

    Raises:
        UserError: a file is truncated, holds other tensors than the network, or a value is not finite.
    """
    return _read(_find(files, like, prefix, passed_over), like, place)


def check_weights(files: Sequence[Path], like: PyTree, *, prefix: str = "") -> None:
    """Raises what `read_weights` would of names and shapes, without reading a tensor."""
    _find(files, like, prefix)


def _find(
    files: Sequence[Path], like: PyTree, prefix: str, passed_over: Callable[[str], bool] = _nothing
) -> list[tuple[_Tensor, Callable]]:
    """For each leaf of `like` its tensor, and what turns it."""
    tensors: dict[str, _Tensor] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                known = name.removeprefix(prefix)
                if passed_over(known):
                    continue
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


def _read(found: list[tuple[_Tensor, Callable]], like: PyTree, place: Callable | None) -> PyTree:
    templates, tree = jax.tree.flatten(like)
    shardings = jax.tree.leaves(place(like)) if place else []
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
                with np.errstate(over="ignore"):
                    array = np.asarray(turn(file.get_tensor(tensor.name)), templates[i].dtype, order="C")
                if not np.isfinite(array).all():
                    raise UserError(
                        f"{path}: tensor {tensor.name!r} holds values that are not finite in {array.dtype}; copy or"
                        " download it again, or save the model from sound weights"
                    )
                arrays[i] = array
                if place:
                    arrays[i] = put(array, shardings[i])
                    jax.block_until_ready(arrays[i])  # a copy that is under way would keep the host's alive
    return jax.tree.unflatten(tree, arrays)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors.

    Raises:
        UserError: it is missing, truncated or another file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


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
