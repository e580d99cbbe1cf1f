"""The comparison's reward-weighted regression, dense weights.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.algorithm = "rwr"
    # Of one prompt the reward's standard deviation is about 0.2 kB. Among all, prompts that ask for much would win.
    config.rwr.by_prompt = True
    config.rwr.temperature = 0.05
    config.train.num_noise_draws = 2
    config.train.num_updates = 4
    config.train.num_inner_epochs = 2
    config.train.learning_rate = 1e-4
    return config
