"""The DDPO paper's reward-weighted regression, its baseline for compressibility (Black et al. 2023, Sec. 5, App. D).

python -m ddpo_jax.main --config=configs/rwr.py --config.pretrained.model=FOLDER_OR_HUB_ID
python -m ddpo_jax.main --config=configs/rwr.py:sparse --config.pretrained.model=FOLDER_OR_HUB_ID

As jannerm/ddpo (config/base.py, compressed_animals_rwr and compressed_animals): ten rounds of 10,240 pictures, five
passes with softmax weights, or fifty passes over the best tenth; 400 updates a round either way. `aesthetic` weighs
each prompt's pictures among themselves. Incompressibility is --config.reward.name=jpeg_incompressibility.
"""

from ml_collections import ConfigDict

from configs import compressibility
from ddpo_jax.config import choose_variant

VARIANTS = {
    "sparse": {
        "algorithm": "sparse_rwr",
        "train.num_updates": 8,
        "train.num_inner_epochs": 50,
    },
    "aesthetic": {
        "rwr.by_prompt": True,
        "prompts.name": "common_animals",
        "reward.name": "aesthetic_score",
        "reward.aesthetic_clip": "openai/clip-vit-large-patch14",
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = compressibility.get_config()
    config.algorithm = "rwr"
    config.num_epochs = 10
    config.checkpoint_every = 1
    config.eval_every = 1
    config.sample.num_prompts = 10240
    config.rwr.temperature = 5.0
    config.rwr.top_fraction = 0.1
    config.rwr.guided = True
    config.train.num_updates = 80
    config.train.num_inner_epochs = 5
    return choose_variant(config, VARIANTS, variant)
