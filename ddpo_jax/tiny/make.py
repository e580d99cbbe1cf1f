"""Makes the embedded model, in four commands; each continues where it was stopped.

python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=clip,vae,decoder,unet
python -m ddpo_jax.main --config=configs/tiny.py --workdir=runs/tiny/unet
python -m ddpo_jax.main --config=configs/tiny.py:portraits --workdir=runs/tiny/portraits
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=judge,publish
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ddpo_jax.models.locate import TINY
from ddpo_jax.tiny import clip, judge, unet, vae
from ddpo_jax.tiny.publish import publish


def make_clip(flags: argparse.Namespace) -> None:
    clip.train(flags.workdir / "clip", flags.workdir / "tiny-clip", flags.workdir / "model", num_steps=flags.clip_steps)


def make_vae(flags: argparse.Namespace) -> None:
    print(vae.train(flags.workdir / "vae", flags.workdir / "model", num_steps=flags.vae_steps))


def make_decoder(flags: argparse.Namespace) -> None:
    print(vae.train_decoder(flags.workdir / "decoder", flags.workdir / "model", num_steps=flags.decoder_steps))


def make_unet(flags: argparse.Namespace) -> None:
    unet.write_untrained(flags.workdir / "model")


def make_judge(flags: argparse.Namespace) -> None:
    right = judge.train(flags.workdir / "judge", judge.JUDGE, num_steps=flags.judge_steps)
    print(f"{judge.JUDGE}: right on {right:.2%} of held-out renderings")


def make_publish(flags: argparse.Namespace) -> None:
    publish(flags.workdir, flags.target, hardware=flags.hardware, named=flags.named)


STAGES = {
    "clip": make_clip,
    "vae": make_vae,
    "decoder": make_decoder,
    "unet": make_unet,
    "judge": make_judge,
    "publish": make_publish,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints and logs of the stages")
    parser.add_argument("--stages", required=True, help=f"comma-separated: {', '.join(STAGES)}")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=4000)
    parser.add_argument("--judge-steps", type=int, default=1000)
    parser.add_argument("--target", type=Path, default=TINY, help="where publish writes")
    parser.add_argument("--hardware", default="2 CPU cores", help="what the stages ran on, for the card")
    parser.add_argument(
        "--named", type=int, help="samples that a vision-language model named without being told, for the card"
    )
    flags = parser.parse_args()
    stages = flags.stages.split(",")
    for stage in stages:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r}; expected {', '.join(STAGES)}")
    for stage in stages:
        STAGES[stage](flags)


if __name__ == "__main__":
    main()
