"""A reward that was learned from preferences: a head on a frozen CLIP, and the file that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from safetensors.numpy import save

from ddpo_jax import convert
from ddpo_jax.errors import UserError, number, numbers
from ddpo_jax.models.folder import parsed, read_metadata, read_weights
from ddpo_jax.models.mlp import PreferenceHead
from ddpo_jax.rewards import clip, clip_score
from ddpo_jax.sharding import first_device
from ddpo_jax.types import PyTree
from ddpo_jax.workdir import replace_file

ABOUT = "learned_reward"  # in the metadata of the file, as JSON


class About(NamedTuple):
    """What a head was fitted on, and how it went."""

    clip: str  # as it was given: tiny, a folder or a hub id
    clip_width: int
    clip_fingerprint: str
    hidden: tuple[int, ...]
    figures: Mapping[str, Any]  # for people


def make(source: str, clip_source: str = "", *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of a learned reward: a head on what a CLIP makes of a picture and its prompt.

    r = (f([E_I, S], E_T) - mean) / std, with f a `PreferenceHead` and mean and std those of its training pictures. The
    difference of two pictures' scores, times std, is the log-odds that the first is preferred (Bradley & Terry 1952).
    Differentiable in the pictures.

    source: `reward.learned_model`, the file that ddpo_jax.fit_reward wrote.  clip_source: `reward.learned_clip`, the
    CLIP that it was fitted on, if it is elsewhere than the file says.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file.
    """
    if not source:
        raise UserError("reward.learned_model='': expected the file that python -m ddpo_jax.fit_reward wrote")
    path = Path(source).expanduser()
    about = read_about(path)
    named = clip_source or about.clip
    found = clip.load(named, field="reward.learned_clip", place=place)
    if found.width != about.clip_width:
        raise UserError(
            f"{path}: fitted on a CLIP of width {about.clip_width}, {about.clip!r}; reward.learned_clip={named!r} has"
            f" width {found.width}; give the former"
        )
    if found.fingerprint != about.clip_fingerprint:
        raise UserError(
            f"{path}: fitted on a CLIP with other weights, {about.clip!r}, than reward.learned_clip={named!r} has; give"
            " the former, or fit the reward anew on the latter"
        )
    head = PreferenceHead(about.hidden)
    params = read_weights((path,), head_shapes(head, found), place=place)

    def score(params: PyTree, picture: Float[Array, "b e"], text: Float[Array, "b d"]) -> Float[Array, " b"]:
        return head.apply({"params": params["head"]}, picture, text)

    return clip_score.judged_by_prompt(found._replace(embed_images=found.describe_images), score, head=params)


def head_shapes(head: PreferenceHead, found: clip.CLIP) -> PyTree:
    """The shapes of a head's parameters on this CLIP."""
    inputs = jnp.zeros((1, found.described)), jnp.zeros((1, found.width))
    return jax.eval_shape(head.init, jax.random.key(0), *inputs)["params"]


def read_about(path: Path) -> About:
    """What the file of a learned reward says of itself.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"reward.learned_model={str(path)!r}: {found}; expected a file that ddpo_jax.fit_reward wrote")
    told = read_metadata(path).get(ABOUT)
    if told is None:
        raise UserError(f"{path}: it does not say that it is a learned reward; expected a file that fit_reward wrote")
    return parsed(path, _about, {ABOUT: told})


def write(path: Path, params: PyTree, about: About) -> None:
    """Writes a head's parameters, in float32, and what it was fitted on, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = convert.to_torch(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    replace_file(path, save(tensors, metadata={ABOUT: json.dumps(about._asdict())}))


def _about(fields: Mapping[str, str]) -> About:
    about = json.loads(fields[ABOUT])
    return About(
        clip=str(about["clip"]),
        clip_width=number(about, "clip_width"),
        clip_fingerprint=str(about["clip_fingerprint"]),
        hidden=numbers(about, "hidden") if about["hidden"] else (),
        figures=dict(about["figures"]),
    )
