"""The embedded model towards pictures that fit their prompts, scored by the embedded CLIP.

python -m ddpo_jax.main --config=configs/quick_alignment.py

A convnet that was trained apart from the CLIP looks on: the share of the pictures that it recognises counts nothing,
and shows whether the score is gained by better animals, or by fooling the CLIP.
"""

from ml_collections import ConfigDict

from configs import quickstart
from ddpo_jax.tiny.render import ANIMALS


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.reward.name = "clip_score,ddpo_jax.tiny.judge:recognised"
    config.reward.clip_model = "tiny"
    config.reward.clip_template = "a {}"
    config.prompts.list = ANIMALS
    config.reward.weights = (1.0, 0.0)
    return config
