"""The comparison's sparse reward-weighted regression: the best fifth of a round.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import rwr


def get_config() -> ConfigDict:
    config = rwr.get_config()
    config.algorithm = "sparse_rwr"
    config.rwr.top_fraction = 0.2
    config.train.num_inner_epochs = 4
    return config
