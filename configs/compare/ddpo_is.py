"""The comparison's DDPO-IS, with the settings of the quickstart.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.algorithm = "ddpo_is"
    config.sample.shared_noise = True
    config.train.adam_epsilon = 3e-4
    config.train.learning_rate = 9e-5
    config.train.clip_range = 5e-3
    config.train.num_updates = 4
    config.train.min_timestep = 500
    return config
