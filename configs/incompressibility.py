"""The DDPO paper's incompressibility run: pictures that make large JPEGs (Black et al. 2023, Sec. 5 and App. D).

python -m ddpo_jax.main --config=configs/incompressibility.py --config.pretrained.model=FOLDER_OR_HUB_ID
python -m ddpo_jax.main --config=configs/incompressibility.py:lora --config.pretrained.model=FOLDER_OR_HUB_ID

All but the reward is as in compressibility.py.
"""

from ml_collections import ConfigDict

from configs import compressibility

VARIANTS = compressibility.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    config = compressibility.get_config(variant)
    config.reward.name = "jpeg_incompressibility"
    return config
