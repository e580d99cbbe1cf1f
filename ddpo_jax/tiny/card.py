"""The embedded model's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddpo_jax.tiny import clip, vae
from ddpo_jax.tiny.render import ANIMALS
from ddpo_jax.tiny.samples import COLUMNS, ETA, GUIDANCE_SCALE, NUM_STEPS, Verdict

Rows = Sequence[Mapping[str, Any]]

CARD = """---
license: ofl-1.1
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, ddpo_jax, toy]
---

# tiny-sd

A Stable Diffusion small enough to ship inside a Python package: {size:.1f} MB in float16 together with the tiny CLIP
beside it. It draws 45 animals at 64 px, and is there so that `ddpo_jax` can be tried and tested offline. It goes
through the same code as Stable Diffusion 1.5, and is of no other use. Like 2.x it predicts v; like newer models its
latents have {channels} channels.

## What it draws

![One sample of each animal](samples.jpg)

The first sample of each animal at fixed noise, none chosen: {num_steps} steps, eta {eta:g}, guidance {guidance:g},
prompts like "a fox". In the same order, with how many of {num_samples} samples the judge recognises:

{table}

**Accuracy by the judge**: {share:.1%} of the samples are taken for the animal that was asked for; for {num_recognised}
of the 45 animals at least half are. The judge (`ddpo_jax.tiny.judge`) is a small convnet that was trained on renderings
alone, never on a generated picture; it is right on {judge:.1%} of held-out renderings, and on {judge_reconstructed:.1%}
of renderings that went through the VAE. {confusions}

**Named by a reader**: {named}

## How it was made

**Data.** Pictures rendered by `ddpo_jax.tiny.render`: one of 45 animals, its sprite drawn once from Noto Color Emoji
(Debian's fonts-noto-color-emoji, SIL Open Font License 1.1), at random sizes, positions and flips, on plain, gradient,
striped, dotted and checkered backgrounds of 11 colours. Half of the captions name the animal alone ("a fox"), half
the background too ("a fox on a blue striped background"). The UNet's last rounds see portraits only: large, near the
centre, the sprite's own way round. A UNet this small draws those sharply, where it drew an average of all places
before. No photograph and no scraped picture was used.

**Licence.** The sprites, and so what was learned from them, are derived from a font under the SIL Open Font License
1.1; the model is given under it too.

**Commands**

```
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=clip --clip-steps={clip_steps}
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=vae --vae-steps={vae_steps}
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=decoder,unet --decoder-steps={decoder_steps}
python -m ddpo_jax.main --config=configs/tiny.py --workdir=runs/tiny/unet
python -m ddpo_jax.main --config=configs/tiny.py:portraits --workdir=runs/tiny/portraits
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=judge,publish
```

A stage that was stopped continues. Time on {hardware}, work that a stop lost counted in:

| stage | training | time |
|---|---|---|
| CLIP | {clip_steps} steps of {clip_batch} pictures | {clip_time} |
| VAE | {vae_steps} steps of {vae_batch} pictures | {vae_time} |
| VAE's decoder alone | {decoder_steps} steps of {vae_batch} pictures | {decoder_time} |
| UNet | {unet_rounds} rounds of {pictures} pictures, {updates} updates each | {unet_time} |
| UNet, on portraits | {portraits_rounds} rounds of the same | {portraits_time} |

![Loss curves](curves.png)

The figures behind the curves are in `logs/`.

The VAE ({reduction}-fold, {channels} channels) reconstructs held-out renderings at {psnr:.1f} dB; above, some as they
are, and below, reconstructed:

![Held-out renderings and their reconstructions](reconstructions.jpg)

## Use

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("ddpo_jax/assets/tiny-sd")
pipeline("a fox", height=64, width=64, num_inference_steps=20, guidance_scale=3.0).images[0].save("fox.png")
```
"""

CONFUSIONS = 8  # of the most frequent that are told


def model_card(
    rows: Mapping[str, Rows],
    unet_run: Mapping[str, Any],
    vae_config: Mapping[str, Any],
    verdict: Verdict,
    *,
    psnr: float,
    judge_right: tuple[float, float],
    size: int,
    named: int | None,
    hardware: str,
) -> str:
    """README.md of the embedded model.

    rows: of each stage's metrics.jsonl.  unet_run: the UNet run's config, flat.  psnr: dB of the VAE on held-out
    renderings.  judge_right: the judge's accuracy on held-out renderings, and on their reconstructions.  size: bytes of
    weights.  named: how many of the first samples a vision-language model named that saw them without
    their names.
    """
    return CARD.format(
        size=size / 1e6,
        num_steps=NUM_STEPS,
        eta=ETA,
        guidance=GUIDANCE_SCALE,
        num_samples=verdict.num_samples,
        table=_table(verdict),
        share=verdict.share,
        num_recognised=verdict.num_recognised,
        judge=judge_right[0],
        judge_reconstructed=judge_right[1],
        confusions=_confusions(verdict),
        named=_named(named),
        clip_batch=clip.BATCH,
        vae_batch=vae.BATCH,
        clip_steps=rows["clip"][-1]["step"],
        vae_steps=rows["vae"][-1]["step"],
        decoder_steps=rows["decoder"][-1]["step"],
        unet_rounds=rows["unet"][-1]["epoch"] + 1,
        portraits_rounds=rows["portraits"][-1]["epoch"] + 1,
        pictures=unet_run["data.batch_size"],
        updates=unet_run["train.num_updates"],
        clip_time=duration(seconds(rows["clip"])),
        vae_time=duration(seconds(rows["vae"])),
        decoder_time=duration(seconds(rows["decoder"])),
        unet_time=duration(seconds(rows["unet"])),
        portraits_time=duration(seconds(rows["portraits"])),
        hardware=hardware,
        reduction=2 ** (len(vae_config["block_out_channels"]) - 1),
        channels=vae_config["latent_channels"],
        psnr=psnr,
    )


def seconds(rows: Rows) -> float:
    """What a stage took, over all its restarts: rows hold `seconds`, or `seconds/<phase>`."""
    return float(sum(value for row in rows for name, value in row.items() if name.partition("/")[0] == "seconds"))


def duration(spent: float) -> str:
    """Seconds as hours and minutes, for people."""
    hours, minutes = divmod(round(spent / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _named(count: int | None) -> str:
    if count is None:
        return "not asked yet."
    return (
        f"a vision-language model, shown the {len(ANIMALS)} pictures above in another order,\n"
        f"without their names and without a list to choose from, named {count}. No person was asked."
    )


def _table(verdict: Verdict) -> str:
    cells = [f"{animal} {right}" for animal, right in zip(ANIMALS, verdict.right, strict=True)]
    lines = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    lines.insert(1, ["---"] * COLUMNS)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _confusions(verdict: Verdict) -> str:
    told = [f"{asked} for {taken} ({count})" for asked, taken, count in verdict.confusions[:CONFUSIONS]]
    return f"What it takes for another most often: {', '.join(told)}." if told else "It takes none for another."
