"""The embedded model's card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD = """---
license: ofl-1.1
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, ddpo_jax, toy]
---

# tiny-sd

A Stable Diffusion small enough to ship inside a Python package: {size:.1f} MB in float16 together with the tiny CLIP
beside it. It draws 45 animals at 64 px, and is there so that `ddpo_jax` can be tried and tested offline. It goes
through the same code as Stable Diffusion 1.5, and is of no other use.

**Data.** Pictures rendered by `ddpo_jax.tiny.render`: one of 45 animals, its sprite drawn once from Noto Color Emoji
(Debian's fonts-noto-color-emoji, SIL Open Font License 1.1), at random sizes, positions and flips, on plain, gradient,
striped, dotted and checkered backgrounds of 11 colours. Half of the captions name the animal alone ("a fox"), half
the background too ("a fox on a blue striped background"). No photograph and no scraped picture was used.

**Licence.** The sprites, and so what was learned from them, are derived from a font under the SIL Open Font License
1.1; the model is given under it too.

**Made by**

```
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=clip,vae,unet
python -m ddpo_jax.main --config=configs/tiny.py --workdir=runs/tiny/unet
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=publish
```

on 2 cores. The CLIP was trained for {clip_steps} steps of 128 pictures, the VAE (8-fold, 4 channels) for {vae_steps}
steps of 16; it reconstructs held-out pictures at {psnr:.1f} dB. The UNet was trained for {epochs} rounds of {pictures}
pictures, {updates} updates each. `--clip-steps`, `--vae-steps` and `--config.num_epochs` set these numbers; a stage
that was stopped continues.

**Use**

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("ddpo_jax/assets/tiny-sd")
pipeline("a fox", height=64, width=64, num_inference_steps=20, guidance_scale=3.0).images[0].save("fox.png")
```
"""


def model_card(
    figures: Mapping[str, float], config: Mapping[str, Any], *, clip_steps: int, epochs: int, size: int
) -> str:
    """README.md of the embedded model. figures: the VAE's; config: the UNet run's, flat; size: bytes of weights."""
    return CARD.format(
        size=size / 1e6,
        psnr=figures["psnr"],
        vae_steps=int(figures["num_steps"]),
        clip_steps=clip_steps,
        epochs=epochs,
        pictures=config["data.batch_size"],
        updates=config["train.num_updates"],
    )
