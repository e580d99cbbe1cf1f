"""The embedded model towards two rewards at once: fit the prompt, and make large JPEGs.

python -m ddpo_jax.main --config=configs/quick_pair.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.reward.name = "clip_score,jpeg_incompressibility"
    config.reward.clip_model = "tiny"
    # A unit of the first weighs as much as 17 bytes. Both spread alike over the pictures of an earlier embedded model;
    # on this one the second now counts for more.
    config.reward.weights = (1.0, 60.0)
    return config
