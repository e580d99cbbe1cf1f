"""Plain tensors out of files of torch.save, without running what is in them.

Such a file is a pickle: a program that builds objects, by any function that it names. This reads the program itself,
knows the few instructions and the two functions that a dict of tensors is written with, and refuses all else; no
function that a file names is ever looked up.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax import convert
from ddpo_jax.errors import UserError
from ddpo_jax.sharding import first_device, put
from ddpo_jax.types import PyTree

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


# What the readers of zips and numbers raise at bytes that make no sense to them.
BROKEN = (ValueError, TypeError, OverflowError, RuntimeError, EOFError, MemoryError, zlib.error)


class _Named(NamedTuple):
    """A function or class that the file names."""

    module: str
    name: str


class _Storage(NamedTuple):
    """Numbers that are stored beside the program."""

    dtype: Any
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark(NamedTuple):
    """Where a list of arguments begins on the stack."""


class _Refused(Exception):
    pass


def read_torch_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote of a flat dict of tensors, such as a module's state_dict, by name.

    What is in the file beside tensors, numbers and strings in nested dicts is refused; a dict under "state_dict" is
    taken for the tensors. Files of torch 1.6 (2020) and later are read.

    Raises:
        UserError: it is no such file, or a part of it is no plain tensor.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except BROKEN as error:
        raise UserError(
            f"{path}: not a whole file of torch.save ({type(error).__name__}: {error}); copy or download it again"
        ) from None
    except _Refused as error:
        raise UserError(
            f"{path}: {error}. Only plain tensors are read, and nothing in a file is run; save it as safetensors if you"
            " trust it"
        ) from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path}: not a file of torch.save of torch 1.6 or later, or not whole; save it as safetensors, or copy or"
            " download it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .pth or .safetensors file") from None


def read_torch_weights(
    path: Path,
    like: PyTree,
    *,
    prefix: str = "",
    passed_over: Callable[[str], bool] = lambda name: False,
    place: Callable = first_device,
) -> PyTree:
    """folder.read_weights of a file of torch.save; the host holds all of the file for a while.

    Raises:
        UserError: as read_torch_tensors, and where the tensors are not the network's.
    """
    named = ((name.removeprefix(prefix), tensor) for name, tensor in read_torch_tensors(path).items())
    tensors = {name: tensor for name, tensor in named if not passed_over(name)}
    params = convert.from_torch(tensors, like, source=str(path))
    params = jax.tree.map(lambda array, leaf: np.asarray(array, leaf.dtype, order="C"), params, like)
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(params)):
        raise UserError(f"{path}: it holds values that are not finite; copy or download it again")
    return jax.tree.map(put, params, place(params))


def _read(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _Refused("a part of it is compressed, as torch.save writes none")
    names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise _Refused("it holds no data.pkl")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise _Refused("its numbers are stored big end first")
    top = _build(archive.read(names["data.pkl"]))
    top = top.get("state_dict", top) if isinstance(top, dict) else top
    if not isinstance(top, dict) or not top:
        raise _Refused("it holds no dict of tensors")
    for name, entry in top.items():
        if not isinstance(name, str) or not isinstance(entry, _Tensor):
            raise _Refused(f"{name!r} is no tensor")

    def stored(tensor: _Tensor) -> np.ndarray:
        key = f"data/{tensor.storage.key}"
        if key not in names:
            raise _Refused(f"the numbers {key} are missing")
        return _view(np.frombuffer(archive.read(names[key]), tensor.storage.dtype), tensor)

    return {name: stored(tensor) for name, tensor in top.items()}


def _view(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    fields = (tensor.offset, *tensor.shape, *tensor.strides)
    if any(type(field) is not int or field < 0 for field in fields):
        raise _Refused(f"a tensor has shape {tensor.shape} and strides {tensor.strides}")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, numbers.dtype)
    if last >= len(numbers) or np.prod(tensor.shape, dtype=object) > len(numbers):
        raise _Refused(f"a tensor of shape {tensor.shape} reaches beyond its {len(numbers)} numbers")
    strides = tuple(stride * numbers.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides).copy()


def _build(program: bytes) -> Any:
    """What the program builds."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for name, argument in _instructions(program):
            if name == "STOP":
                return stack.pop()
            _step(name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise _Refused(f"its program is broken ({type(error).__name__}: {error})") from None
    raise _Refused("its program does not end")


def _instructions(program: bytes) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
        yield opcode.name, argument


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("PROTO", "FRAME"):
        pass
    elif name in LITERALS:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name == "MARK":
        stack.append(_Mark())
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name in TUPLES:
        stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _set(stack[-1], [key, value])
    elif name == "SETITEMS":
        entries = _since_mark(stack)
        _set(stack[-1], entries)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_Named(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_Named(module, attribute))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments))
    elif name == "BUILD":
        _check_metadata(stack.pop())  # a state_dict carries its modules' version numbers
    else:
        raise _Refused(f"its program has the instruction {name}")


def _since_mark(stack: list[Any]) -> list[Any]:
    mark = max(i for i, entry in enumerate(stack) if isinstance(entry, _Mark))
    found = stack[mark + 1 :]
    del stack[mark:]
    return found


def _set(target: Any, entries: list[Any]) -> None:
    if not isinstance(target, dict):
        raise _Refused("its program sets an item of what is no dict")
    target.update(zip(entries[::2], entries[1::2], strict=True))


def _storage(identity: Any) -> _Storage:
    kind, storage, key = identity[:3]
    if kind != "storage" or not isinstance(storage, _Named) or storage.module != "torch":
        raise _Refused("it refers to what is no storage of numbers")
    if storage.name not in STORAGES:
        raise _Refused(f"its tensors are stored as {storage.name}")
    return _Storage(STORAGES[storage.name], str(key))


def _call(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Named("collections", "OrderedDict"), ():
            return {}
        case _Named("torch._utils", "_rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, *_):
            return _Tensor(storage, offset, shape, strides)
        case _Named("torch._utils", "_rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
    told = ".".join(function) if isinstance(function, _Named) else repr(function)
    raise _Refused(f"it asks for {told} to be called")


def _check_metadata(state: Any) -> None:
    """The attribute _metadata of a state_dict, which is dropped, is all that may be set on an object."""
    if not isinstance(state, dict) or set(state) != {"_metadata"}:
        raise _Refused("its program sets the state of an object")
