"""From a trained workdir to the folders that ship: float16 weights, and a card with what was measured on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from safetensors.numpy import load_file

from ddpo_jax import metrics
from ddpo_jax.models.folder import read_json, write_tensors
from ddpo_jax.tiny import judge, samples, vae
from ddpo_jax.tiny.card import model_card
from ddpo_jax.tiny.fit import rendered
from ddpo_jax.tiny.pictures import write_curves, write_sheet

STAGES = ("clip", "vae", "decoder", "unet", "portraits")
SHOWN = 9  # of them in the card


class Measured(NamedTuple):
    """What the published weights do."""

    originals: Float32[np.ndarray, "b 64 64 3"]  # held-out renderings
    reconstructions: Float32[np.ndarray, "b 64 64 3"]
    judge_right: float  # the share of held-out renderings that the judge knows
    judge_right_reconstructed: float  # and of those that went through the VAE
    drawn: Float32[np.ndarray, "45 n H W 3"]
    found: Int[np.ndarray, "45 n"]  # what the judge takes them for


def publish(workdir: Path, target: Path, *, hardware: str, named: int | None) -> None:
    """Writes the trained parts to `target`, the CLIP beside it, and the card with its pictures."""
    copy_parts(workdir, target)
    measured = measure(target)
    write_card(workdir, target, measured, hardware=hardware, named=named)
    result = samples.verdict(measured.found)
    print(f"{target}: {result.share:.1%} of the samples recognised, {result.num_recognised} animals")


def copy_parts(workdir: Path, target: Path) -> None:
    """Writes the trained parts to `target` in float16, and the CLIP beside it."""
    _copy_folder(workdir / "portraits" / "export", target)
    _copy_folder(workdir / "model" / "vae", target / "vae")  # its decoder may be younger than the UNet's run
    for path in target.rglob("*.safetensors"):
        tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}
        write_tensors(path, tensors)
    clip_folder = _clip_beside(target)
    _copy_folder(workdir / "tiny-clip", clip_folder)
    shutil.copytree(target / "tokenizer", clip_folder, dirs_exist_ok=True)  # a CLIP folder carries its own


def measure(target: Path) -> Measured:
    """Measures the folder as it lies there."""
    recognise = judge.load()
    originals, captions = rendered(vae.HELD_OUT_INDEX, vae.HELD_OUT)
    reconstructions = samples.reconstruct(str(target), originals)
    drawn = samples.draw(str(target))
    return Measured(
        originals=originals,
        reconstructions=reconstructions,
        judge_right=judge.share_right(recognise, *rendered(judge.HELD_OUT_INDEX, judge.HELD_OUT)),
        judge_right_reconstructed=judge.share_right(recognise, reconstructions, captions),
        drawn=drawn,
        found=samples.recognise_all(recognise, drawn),
    )


def write_card(workdir: Path, target: Path, measured: Measured, *, hardware: str, named: int | None) -> None:
    """Writes README.md, its pictures and the stages' logs into `target`."""
    (target / "logs").mkdir()
    for stage in STAGES:
        shutil.copy(workdir / stage / "metrics.jsonl", target / "logs" / f"{stage}.jsonl")
    rows = {stage: metrics.read(target / "logs" / f"{stage}.jsonl") for stage in STAGES}
    write_curves(target / "curves.png", **rows)
    strip = np.concatenate([measured.originals[:SHOWN], measured.reconstructions[:SHOWN]])
    write_sheet(target / "reconstructions.jpg", strip, columns=SHOWN)
    write_sheet(target / "samples.jpg", measured.drawn[:, 0], columns=samples.COLUMNS)
    folders = (target, _clip_beside(target))
    text = model_card(
        rows,
        read_json(workdir / "portraits" / "config.json"),
        read_json(target / "vae" / "config.json"),
        samples.verdict(measured.found),
        psnr=vae.psnr(4 * float(np.mean((measured.reconstructions - measured.originals) ** 2))),
        judge_right=(measured.judge_right, measured.judge_right_reconstructed),
        size=sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")),
        named=named,
        hardware=hardware,
    )
    (target / "README.md").write_text(text, encoding="utf-8")


def _clip_beside(target: Path) -> Path:
    return target.parent / "tiny-clip"


def _copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
