"""The embedded model towards pictures that fit their prompts, scored by the embedded CLIP.

python -m ddpo_jax.main --config=configs/quick_alignment.py

It has learned to draw "a fox". Asked for "fox", as here, it draws what it likes: alignment has something to teach. The
CLIP compares each picture with "a fox". A convnet that was trained apart from the CLIP looks on: the share of the
pictures that it recognises counts nothing, and shows whether the score is gained by better animals, or by fooling the
CLIP.
"""

from ml_collections import ConfigDict

from configs import quickstart
from ddpo_jax.tiny.render import ANIMALS


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.num_epochs = 40
    config.prompts.list = ANIMALS
    config.reward.name = "clip_score,ddpo_jax.tiny.judge:recognised"
    config.reward.clip_model = "tiny"
    config.reward.clip_template = "a {}"
    config.reward.weights = (1.0, 0.0)
    # Each animal asks for another change, where the JPEG rewards ask for the same of all: it takes more pictures.
    config.sample.num_steps = 4
    config.sample.num_samples_per_prompt = 8
    config.sample.chunk_size = 64
    config.train.min_timestep = 500
    config.train.micro_batch_size = 64
    config.train.learning_rate = 3e-4
    config.train.num_decay_steps = config.num_epochs * config.train.num_updates
    config.per_prompt_stat_tracking.buffer_size = 16
    return config
