"""Where a model is: the embedded one, a local folder, or the Hugging Face hub, of which what is read is fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ddpo_jax.errors import UserError
from ddpo_jax.models.folder import ASSETS, PICKLES, STEMS, missing, stored_as

TORCH_FILE = "pytorch_model.bin"  # of which plain tensors are read by torch_file, where there are no safetensors
REWARD_FILES = ("image_reward.safetensors", "model.safetensors", "ImageReward.pt")  # the last: as published
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
TINY, TINY_CLIP = ASSETS / "tiny-sd", ASSETS / "tiny-clip"


def pipeline_files(names: Sequence[str] | None, variant: str = "") -> tuple[str, ...]:
    """What is asked of the hub for a pipeline: JSON and tokenizer files, and the safetensors that would be read.

    names: the repository's files; None if they are not known.

    Raises:
        UserError: a part has no safetensors.
    """
    weights = []
    for part, stem in STEMS.items():
        own = names and [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        if own == []:
            continue  # not of this pipeline class, or told of when the folder is read
        found = [suffix for suffix in dict.fromkeys((variant, "")) if own is None or stored_as(own, stem, suffix)]
        if not found:
            raise UserError(f"{part}/{stem}.safetensors: no such file{missing(own, stem)}")
        for suffix in found if own is None else found[:1]:
            dot = f".{suffix}" if suffix else ""
            weights += [f"{part}/{stem}{end}" for end in (dot, f"{dot}-?????-of-?????", f"-?????-of-?????{dot}")]
    return ("*.json", "*/*.json", "*/merges.txt", *dict.fromkeys(f"{name}.safetensors" for name in weights))


def clip_files(names: Sequence[str] | None) -> tuple[str, ...]:
    """What is asked of the hub for a CLIP.

    Raises:
        UserError: it has no safetensors.
    """
    if names is not None and not stored_as(names, "model", ""):
        raise UserError(f"model.safetensors: no such file{missing(names, 'model', settable=False)}")
    return ("*.json", "merges.txt", "model.safetensors", "model-?????-of-?????.safetensors")


def encoder_files(names: Sequence[str] | None) -> tuple[str, ...]:
    """What is asked of the hub for an encoder of the BERT family: of one without safetensors torch's own file.

    Raises:
        UserError: it has neither.
    """
    if names is not None and TORCH_FILE in names and not stored_as(names, "model", ""):
        return ("*.json", "merges.txt", "vocab.txt", TORCH_FILE)
    return (*clip_files(names), "vocab.txt")


def image_reward_files(names: Sequence[str] | None) -> tuple[str, ...]:
    """What is asked of the hub for ImageReward: its own file where it has no safetensors.

    Raises:
        UserError: it has neither.
    """
    stored = REWARD_FILES if names is None else tuple(name for name in REWARD_FILES if name in names)[:1]
    if not stored:
        raise UserError(f"expected one of {', '.join(REWARD_FILES)}; this is no ImageReward")
    return (*TOKENIZER_FILES, "med_config.json", *stored)


def locate_pipeline(source: str, *, variant: str, revision: str) -> Path:
    """The local folder of a pipeline whose weights are of this variant."""
    return locate(source, hub_files=partial(pipeline_files, variant=variant), revision=revision)


def locate(
    source: str,
    *,
    field: str = "pretrained.model",
    tiny: Path = TINY,
    hub_files: Callable = pipeline_files,
    revision: str = "",
) -> Path:
    """The local folder of a model: `tiny`, a path, or a hub id. `field` is the config's, for errors.

    tiny: what `tiny` stands for.
    hub_files: names of a repository's files, or None if they are not known -> patterns of those to fetch.
    revision: of a hub id: a branch, a tag or a commit; the newest if empty.

    Raises:
        UserError: there is no such folder, it is a single file, or the hub does not give the model.
    """
    if source == "tiny":
        return tiny
    path = Path(source).expanduser()
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"{field}={source!r}: no folder has such a name ({error.strerror})") from None
    if not source:
        raise UserError(f"{field}='': expected a model folder, a hub id or 'tiny'")
    if path.is_dir():
        if revision:
            raise UserError(f"pretrained.revision={revision!r} is of a hub id; for the folder {source!r} set ''")
        _check_folder([file.name for file in path.iterdir()], path)
        return path
    if path.is_file():
        raise UserError(f"{field}={source!r} is a file; {_how_to_convert(path)}")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{field}={source!r}: no such folder; expected a model folder, a hub id or 'tiny'")
    from huggingface_hub import snapshot_download

    names = _list(source, revision)
    try:
        _check_folder(names or [], Path(source))
        patterns = hub_files(names)
    except UserError as error:
        raise UserError(f"{field}={source!r}: {error}") from None
    try:
        return Path(snapshot_download(source, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # huggingface_hub raises many unrelated types for "not reachable" and "not there"
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{field}={source!r}: no such folder, and the hub did not give it{at} ({error});"
            " download it first and give the folder"
        ) from error


def _list(source: str, revision: str) -> list[str] | None:
    """The names of a repository's files; None without a network, where an earlier download may serve."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(source, revision=revision or None)
    except Exception:  # whatever it is, the download that follows tells of it
        return None


def _check_folder(names: Sequence[str], folder: Path) -> None:
    """Raises UserError for a folder whose only model is a single-file checkpoint."""
    single = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
    if single and not any(name.endswith(".json") for name in names):
        raise UserError(f"{folder / single[0]}: {_how_to_convert(folder / single[0])}")


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
