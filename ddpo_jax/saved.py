"""What a run left: its trained parameters joined with the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from ddpo_jax import checkpoint, data
from ddpo_jax.build import load_model
from ddpo_jax.diffusers_folder import export
from ddpo_jax.errors import UserError
from ddpo_jax.finetune import full
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.folder import read_json
from ddpo_jax.models.stable_diffusion import Pretrained, Source
from ddpo_jax.settings import make_finetune
from ddpo_jax.types import Finetune, Model, PyTree
from ddpo_jax.workdir import flatten, unflatten


class Checkpoint(NamedTuple):
    """A saved round of a run."""

    workdir: Path
    step: int  # rounds
    config: ConfigDict
    trainable: PyTree  # numpy; the running average if the run kept one


class Loaded(NamedTuple):
    """A model to sample from, whatever it came from."""

    model: Model
    pretrained: Pretrained  # the denoiser is None where nothing of it is left as it was
    tuning: Finetune
    trainable: PyTree
    config: ConfigDict | None  # of the run, if it came from one


def find_checkpoint(source: str | Path, *, base: Mapping[str, str] = {}) -> Checkpoint | None:
    """The checkpoint that a path names, `WORKDIR` (its newest) or `WORKDIR/checkpoints/STEP`; None if it names none.

    base: fields of `pretrained` that are not as they were when the run began, such as another place; empty ones count
    for nothing.

    Raises:
        UserError: it names one that is missing or not whole.
    """
    path, step = _workdir_and_step(source)
    if not is_run(source):
        if step is None and not (path / "starts.jsonl").is_file():
            return None
        lacks = "checkpoints" if step is None else f"checkpoints/{step}"
        raise UserError(f"{path}: expected a run's folder, with config.json and {lacks}")
    fields = unflatten(read_json(path / "config.json"))
    absent = [name for name in ("pretrained", "train", "sample", "prompts") if not isinstance(fields.get(name), dict)]
    if absent:
        raise UserError(f"{path}/config.json: expected a run's, with the fields of {absent[0]}; give a run's folder")
    older = {"variant": "", "revision": ""}  # configs from before these fields
    if base.get("model"):
        fields["pretrained"]["revision"] = ""  # was of the other
    fields["pretrained"] = older | fields["pretrained"] | {name: value for name, value in base.items() if value}
    found, trainable = checkpoint.read_trainable(path / "checkpoints", step)
    return Checkpoint(path, found, ConfigDict(fields), trainable)


def is_run(source: str | Path) -> bool:
    """Whether the path names a run's folder, or a checkpoint in it."""
    path, _ = _workdir_and_step(source)
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def load(source: str, *, dtype: str, resolution: int | None = None, base: Mapping[str, str] = {}) -> Loaded:
    """The model of a folder, a hub id, `tiny`, or a checkpoint as `find_checkpoint` takes it.

    dtype: what it computes in, "float32" or "bfloat16".  resolution: pixels; None: its own, or its run's.
    base: as in `find_checkpoint`; of a folder or a hub id its `variant` and `revision`.

    Raises:
        UserError: it cannot be used; the message names the file.
    """
    found = find_checkpoint(source, base=base)
    if found is None:
        if base.get("model"):
            raise UserError(f"--base={base['model']} is for a run's folder, and --model={source} is none")
        options = {name: base.get(name, "") for name in ("variant", "revision")}
        model, pretrained = stable_diffusion.load(source, dtype=np.dtype(dtype), resolution=resolution, **options)
        return Loaded(model, pretrained._replace(denoiser=None), full(), pretrained.denoiser, None)
    config, tuning = found.config, make_finetune(found.config.train)
    config.compute_dtype = dtype
    config.train.remat, config.attention, config.convolution = "none", "auto", "auto"
    config.pretrained.resolution = resolution or config.pretrained.resolution
    with base_named():
        model, pretrained = load_model(config, tuning)
    check_fit(tuning, found.trainable, pretrained.denoiser, pretrained.source)
    if not tuning.reads_pretrained:
        pretrained = pretrained._replace(denoiser=None)
    return Loaded(model, pretrained, tuning, jax.device_put(found.trainable), config)


def _workdir_and_step(source: str | Path) -> tuple[Path, int | None]:
    path = Path(source).expanduser()
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parents[1], int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


@contextmanager
def base_named() -> Iterator[None]:
    """Errors about the model that a run began with name the flag that gives another one."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("pretrained.model=", "--base=")) from None


def check_fit(tuning: Finetune, trainable: PyTree, pretrained: PyTree, source: Source) -> None:
    """Raises UserError if what was trained is not of the denoiser `pretrained`, arrays or shapes, from `source`."""

    def shapes(tree: PyTree) -> list[tuple]:
        return [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

    if shapes(trainable) != shapes(jax.eval_shape(tuning.init, jax.random.key(0), pretrained)):
        raise UserError(
            f"the checkpoint is of another model than {source.folder}: its parameters have other names or shapes; give"
            " the one that the run began with: --base=FOLDER"
        )


def export_trained(
    source: Source,
    target: Path,
    tuning: Finetune,
    trainable: PyTree,
    *,
    about: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes a diffusers folder of `source` with what was trained. `trainable` is on the host.

    What adapters are added to is read anew from the files: a run in half precision keeps less of it.
    """
    check_fit(tuning, trainable, stable_diffusion.denoiser_shapes(source), source)
    pretrained = stable_diffusion.read_denoiser(source) if tuning.reads_pretrained else None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the accelerator may be full
        denoiser = tuning.merge(pretrained, trainable)
    export(source, target, denoiser, about=about, dtype=dtype, adapters=tuning.adapters(trainable))


def about(config: ConfigDict, *, name: str, epochs: int) -> dict[str, Any]:
    """What an exported folder's model card tells."""
    return {
        "name": name,
        "model": config.pretrained.model,
        "algorithm": config.algorithm,
        "prompt": example_prompt(config.prompts),
        "num_steps": config.sample.num_steps,
        "guidance_scale": config.sample.guidance_scale,
        "eta": config.sample.eta,
        "figures": {"epochs": epochs, "reward": config.reward.name},
        "config": json.loads(json.dumps(flatten(config.to_dict()))),
    }


def example_prompt(prompts: ConfigDict) -> str:
    """One of the run's prompts; another where their file is gone."""
    try:
        return data.prompt_source(prompts.name, tuple(prompts.list)).texts[0]
    except UserError:
        return "a photo of a cat"
