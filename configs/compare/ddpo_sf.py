"""The comparison's DDPO-SF: as its DDPO-IS, with the one update a round that it may make.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import ddpo_is


def get_config() -> ConfigDict:
    config = ddpo_is.get_config()
    config.algorithm = "ddpo_sf"
    config.train.num_updates = 1
    config.train.num_warmup_steps = 2
    config.train.learning_rate = 2.4e-4
    return config
