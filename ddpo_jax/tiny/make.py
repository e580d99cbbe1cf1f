"""Makes the embedded model, in three commands; each continues where it was stopped.

python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=clip,vae,unet
python -m ddpo_jax.main --config=configs/tiny.py --workdir=runs/tiny/unet
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=publish
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ddpo_jax import metrics
from ddpo_jax.models.folder import TINY, read_json, write_json, write_tensors
from ddpo_jax.tiny import clip, unet, vae
from ddpo_jax.tiny.card import model_card


def publish(workdir: Path, target: Path) -> None:
    """Writes the trained parts to `target` (and the CLIP beside it) in float16, with a model card."""
    trained = workdir / "unet" / "export"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(trained, target)
    for path in target.rglob("*.safetensors"):
        tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}
        write_tensors(path, tensors)
    clip_folder = target.parent / "tiny-clip"
    shutil.rmtree(clip_folder, ignore_errors=True)
    shutil.copytree(workdir / "tiny-clip", clip_folder)
    figures = json.loads((workdir / "vae" / "figures.json").read_text())
    epochs = len(metrics.read(workdir / "unet" / "metrics.jsonl"))
    clip_steps = metrics.read(workdir / "clip" / "metrics.jsonl")[-1]["step"]
    size = sum(path.stat().st_size for folder in (target, clip_folder) for path in folder.rglob("*.safetensors"))
    config = read_json(workdir / "unet" / "config.json")
    (target / "README.md").write_text(
        model_card(figures, config, clip_steps=clip_steps, epochs=epochs, size=size), encoding="utf-8"
    )
    print(f"{target}: {size / 1e6:.1f} MB of weights with {clip_folder.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints and logs of the stages")
    parser.add_argument("--stages", required=True, help="comma-separated: clip, vae, unet, publish")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--target", type=Path, default=TINY, help="where publish writes")
    flags = parser.parse_args()
    folder = flags.workdir / "model"
    for stage in flags.stages.split(","):
        if stage == "clip":
            clip.train(flags.workdir / "clip", flags.workdir / "tiny-clip", folder, num_steps=flags.clip_steps)
        elif stage == "vae":
            figures = vae.train(flags.workdir / "vae", folder, num_steps=flags.vae_steps)
            write_json(flags.workdir / "vae" / "figures.json", figures)
        elif stage == "unet":
            unet.write_untrained(folder)
        elif stage == "publish":
            publish(flags.workdir, flags.target)
        else:
            parser.error(f"unknown stage {stage!r}; expected clip, vae, unet or publish")


if __name__ == "__main__":
    main()
