"""diffusers and transformers tensors <-> Flax trees: one table of names, one of leaves, both ways, bit-exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from ddpo_jax.errors import UserError
from ddpo_jax.types import PyTree

# Torch containers that number their children: `resnets.0` there is `resnets_0` here.
NUMBERED = re.compile(
    r"\b(down_blocks|up_blocks|resnets|attentions|transformer_blocks|blocks|downsamplers|upsamplers|layers?|to_out|net)_(\d+)\b"
)

# Names that older checkpoints use, rewritten before anything else reads them.
OLD_NAMES = (
    # AutoencoderKL before diffusers 0.18, SD 1.5's own folder among them.
    (re.compile(r"(mid_block\.attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(mid_block\.attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(mid_block\.attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(mid_block\.attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
    # BERT as converted from TensorFlow, bert-base-uncased's own folder among them.
    (re.compile(r"\bLayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"\bLayerNorm\.beta$"), "LayerNorm.bias"),
)

# Linear layers that the same checkpoints may keep as 1x1 convolutions.
MAYBE_CONVOLUTION = re.compile(r"mid_block\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")

# Buffers that some checkpoints carry and no network reads.
IGNORED = re.compile(r"(^|\.)position_ids$")


class Leaf(NamedTuple):
    """How one kind of leaf is stored on either side."""

    torch_name: str
    to_flax: Callable
    to_torch: Callable


def _same(x):
    return x


LEAVES = {
    ("kernel", 4): Leaf("weight", lambda w: w.transpose(2, 3, 1, 0), lambda k: k.transpose(3, 2, 0, 1)),
    ("kernel", 2): Leaf("weight", lambda w: w.T, lambda k: k.T),
    ("scale", 1): Leaf("weight", _same, _same),
    ("embedding", 2): Leaf("weight", _same, _same),
    ("bias", 1): Leaf("bias", _same, _same),
    ("cls_token", 3): Leaf("cls_token", _same, _same),  # these two: BLIP's
    ("pos_embed", 3): Leaf("pos_embed", _same, _same),
    ("class_embedding", 1): Leaf("class_embedding", _same, _same),
    ("logit_scale", 0): Leaf("logit_scale", _same, _same),
    ("q_bias", 1): Leaf("q_bias", _same, _same),  # DeBERTa's, beside a projection without
    ("v_bias", 1): Leaf("v_bias", _same, _same),
}


def torch_key(path: tuple[str, ...], ndim: int) -> tuple[str, Leaf]:
    """The torch name of a Flax leaf, and how it is stored.

    Raises:
        UserError: no rule for this leaf.
    """
    *modules, name = path
    if (name, ndim) not in LEAVES:
        raise UserError(f"no conversion rule for the {ndim}-dimensional parameter {'/'.join(path)}")
    leaf = LEAVES[name, ndim]
    modules = [NUMBERED.sub(r"\1.\2", module) for module in modules]
    return ".".join([*modules, leaf.torch_name]), leaf


def leaf_path(path: tuple) -> tuple[str, ...]:
    """The keys of a leaf in nested dicts, from jax.tree_util's path."""
    return tuple(entry.key for entry in path)


class Stored(NamedTuple):
    """Where a Flax leaf is in a file, and how it comes out."""

    name: str  # in the file
    to_flax: Callable


def match(shapes: Mapping[str, tuple[int, ...]], like: PyTree, *, source: str) -> PyTree:
    """The tree of `like` with a Stored for each leaf, found among torch-named tensors of these shapes.

    `source` names the file in errors.

    Raises:
        UserError: a tensor is missing, has another shape, or is left over.
    """
    names = {_modern(name): name for name in shapes if not IGNORED.search(name)}
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    places = {}
    for path, template in leaves:
        key, leaf = torch_key(leaf_path(path), len(template.shape))
        places[key] = leaf, tuple(leaf.to_torch(np.empty(template.shape, np.bool_)).shape)
    missing, unused = sorted(places.keys() - names.keys()), sorted(names.keys() - places.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{source}: tensor {missing[0]!r} is missing{more}; copy it and the config.json beside it from one model"
        )
    if unused:
        raise UserError(
            f"{source}: {len(unused)} tensors have no place in this network, such as {unused[:5]};"
            " copy it and the config.json beside it from one model"
        )

    found = []
    for key, (leaf, expected) in places.items():
        shape, to_flax = tuple(shapes[names[key]]), leaf.to_flax
        if shape == (*expected, 1, 1) and MAYBE_CONVOLUTION.search(key):
            to_flax = _of_convolution(to_flax)
        elif shape != expected:
            raise UserError(
                f"{source}: tensor {key!r} has shape {shape}; config.json implies {expected}; copy both from one model"
            )
        found.append(Stored(names[key], to_flax))
    return jax.tree.unflatten(tree, found)


def from_torch(tensors: Mapping[str, np.ndarray], like: PyTree, *, source: str) -> PyTree:
    """The Flax tree with the structure and shapes of `like`, filled from torch-named tensors; dtypes are kept.

    Raises:
        UserError: as `match` does.
    """
    stored = match({name: tensor.shape for name, tensor in tensors.items()}, like, source=source)
    return jax.tree.map(lambda leaf: leaf.to_flax(tensors[leaf.name]), stored, is_leaf=is_stored)


def is_stored(node: PyTree) -> bool:
    return isinstance(node, Stored)


def to_torch(tree: PyTree) -> dict[str, np.ndarray]:
    """Contiguous torch-named tensors of a Flax tree; dtypes are kept."""
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        key, leaf = torch_key(leaf_path(path), np.ndim(value))
        tensors[key] = np.asarray(leaf.to_torch(np.asarray(value)), order="C")
    return tensors


def adapters_to_torch(adapters: Mapping[str, tuple], *, prefix: str) -> dict[str, np.ndarray]:
    """Adapters as PEFT names and stores them: `lora_A.weight` (r, in, ...) and `lora_B.weight` (out, r, ...).

    adapters: by the path of their kernel, A (..., in, r) and B (r, out), with α / r in B.
    """
    tensors = {}
    for path, (a, b) in adapters.items():
        a, b = np.asarray(a), np.asarray(b)
        key, leaf = torch_key(tuple(path.split("/")), a.ndim)
        b = b.reshape(*(1,) * (a.ndim - 2), *b.shape)
        for name, factor in (("lora_A", a), ("lora_B", b)):
            module = key.removesuffix(leaf.torch_name)
            tensors[f"{prefix}{module}{name}.weight"] = np.asarray(leaf.to_torch(factor), np.float32, order="C")
    return tensors


def _of_convolution(to_flax: Callable) -> Callable:
    return lambda tensor: to_flax(tensor[:, :, 0, 0])


def _modern(name: str) -> str:
    for pattern, replacement in OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name
