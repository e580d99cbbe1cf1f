"""The quickstart by adapters on the attention kernels instead of the whole UNet.

python -m ddpo_jax.main --config=configs/quick_lora.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.num_epochs = 17  # a few more, and the animals are lost in texture
    config.train.lora_rank = 4
    config.train.adam_epsilon = 1e-8
    config.train.learning_rate = 1.1e-3
    return config
