"""The embedded model towards pictures that fit their prompts, judged by the embedded CLIP.

python -m ddpo_jax.main --config=configs/quick_alignment.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.reward.name = "clip_score"
    return config
