"""Supervised fine-tuning of the embedded model on rendered portraits, minutes on 2 cores.

python -m ddpo_jax.main --config=configs/quick_sft.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.algorithm = "sft"
    config.num_epochs = 4
    config.checkpoint_every = 2
    config.eval_every = 2
    config.prompts.name = "common_animals"
    config.prompts.held_out = 0.2
    config.reward.name = "clip_score"
    config.data.source = "ddpo_jax.tiny.render:render"
    config.data.batch_size = 512
    config.sample.num_steps = 10
    config.sample.guidance_scale = 1.0
    config.sample.chunk_size = 64
    config.train.num_updates = 8
    config.train.num_noise_draws = 2
    config.train.learning_rate = 1e-4
    config.train.micro_batch_size = 64
    return config
