"""The embedded model towards two rewards at once: fit the prompt, and make large JPEGs.

python -m ddpo_jax.main --config=configs/quick_pair.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.reward.name = "clip_score,jpeg_incompressibility"
    config.reward.clip_model = "tiny"
    # Among pictures that are compared, those of a draw, the fit spreads by 3.4 points and the size by 0.045 kB: so
    # weighed, both say about as much.
    config.reward.weights = (1.0, 60.0)
    # Each pulls against the other: it takes longer than one alone.
    config.num_epochs = 35
    return config
