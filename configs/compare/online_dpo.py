"""The comparison's online Diffusion-DPO: of each draw of a prompt the two best against the two worst.

python -m benchmarks.compare --workdir=runs/compare
"""

from ml_collections import ConfigDict

from configs.compare import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.algorithm = "online_dpo"
    config.dpo.beta = 1000.0
    config.dpo.num_pairs = 2
    config.dpo.reference_every = 1
    config.train.num_noise_draws = 4
    config.train.num_updates = 4
    config.train.num_inner_epochs = 2
    config.train.learning_rate = 1e-4
    return config
