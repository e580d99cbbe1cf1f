"""The embedded model's UNet, trained by sft on rendered animals: from scratch, then on portraits.

python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=clip,vae,decoder,unet
python -m ddpo_jax.main --config=configs/tiny.py --workdir=runs/tiny/unet
python -m ddpo_jax.main --config=configs/tiny.py:portraits --workdir=runs/tiny/portraits
python -m ddpo_jax.tiny.make --workdir=runs/tiny --stages=judge,publish
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "portraits": {
        "seed": 1,  # other noise than the first run's
        "pretrained.model": "runs/tiny/unet/export",
        "data.source": "ddpo_jax.tiny.render:portrait",
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.algorithm = "sft"
    config.num_epochs = 50
    config.checkpoint_every = 1
    config.eval_every = 5
    config.eval_prompts = 45
    config.pretrained.model = "runs/tiny/model"
    config.data.source = "ddpo_jax.tiny.render:render"
    config.data.batch_size = 1024
    config.train.num_noise_draws = 4
    config.data.prompt_dropout = 0.1
    config.sample.num_steps = 20
    config.sample.guidance_scale = 3.0
    config.sample.chunk_size = 45
    config.train.num_updates = 64
    config.train.micro_batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.num_warmup_steps = 100
    config.train.num_decay_steps = 50 * 64
    config.train.adam_weight_decay = 1e-3
    config.train.ema_decay = 0.998
    return choose_variant(config, VARIANTS, variant)
