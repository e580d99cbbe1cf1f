"""The comparison's reward backpropagation, through two of the four denoising steps.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.algorithm = "reward_backprop"
    config.backprop.min_steps = 2
    config.backprop.max_steps = 2
    config.train.num_updates = 4
    config.train.learning_rate = 1e-4
    config.train.micro_batch_size = 32
    return config
