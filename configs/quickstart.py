"""DDPO on the embedded model, on a laptop: JPEG incompressibility, minutes on 2 cores.

python -m ddpo_jax.main --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.num_epochs = 30
    config.checkpoint_every = 5
    config.eval_every = 10
    config.prompts.name = "common_animals"
    config.prompts.held_out = 0.2
    config.reward.name = "jpeg_incompressibility"
    config.sample.num_steps = 5
    config.sample.guidance_scale = 1.0
    config.sample.num_prompts = 32
    config.sample.num_samples_per_prompt = 4
    config.sample.chunk_size = 32
    config.train.learning_rate = 8e-5
    config.train.num_warmup_steps = 8
    config.train.clip_range = 5e-3
    config.train.num_updates = 4
    config.train.micro_batch_size = 32
    # Two ways to a clear gradient from 128 samples a round: only the first two steps are learned from (base.py says
    # what is wrong with the last; the third's gradient was mostly noise too), and each animal has its own baseline.
    config.train.min_timestep = 500
    config.per_prompt_stat_tracking.buffer_size = 8
    config.per_prompt_stat_tracking.min_count = 4
    return config
