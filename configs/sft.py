"""Supervised fine-tuning of Stable Diffusion on captioned images.

python -m ddpo_jax.main --config=configs/sft.py --config.data.source=DIR --config.pretrained.model=FOLDER_OR_HUB_ID
python -m ddpo_jax.main --config=configs/sft.py:sdxl --config.data.source=DIR

The learning rate, the warm-up and the running average are those of diffusers' text-to-image example. A round is a
thousand images, eight updates of 128. To reward what it has learned, give runs/sft/export as the model of another run.
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "sdxl": {
        "pretrained.model": "stabilityai/stable-diffusion-xl-base-1.0",
        "compute_dtype": "bfloat16",
        "train.lora_rank": 16,
        "train.learning_rate": 1e-4,
        "train.ema_decay": 0.0,
        "train.remat": "full",
        "train.micro_batch_size": 1,
        "sample.chunk_size": 1,
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.algorithm = "sft"
    config.num_epochs = 50
    config.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.data.source = "data/captioned"
    config.data.batch_size = 1024
    config.data.prompt_dropout = 0.1
    config.sample.guidance_scale = 7.5
    config.train.num_updates = 8
    config.train.learning_rate = 1e-5
    config.train.num_warmup_steps = 500
    config.train.adam_weight_decay = 1e-2
    config.train.ema_decay = 0.9999
    config.train.micro_batch_size = 4
    return choose_variant(config, VARIANTS, variant)
