"""Clothes that are well shown, fit the outfit and please their wearer: three experts at once, after FashionDPO.

python -m ddpo_jax.main --config=configs/fashion.py --config.pretrained.model=FOLDER_OR_HUB_ID

Li et al. 2025 (FashionDPO) rank pictures by three experts; here they are standardised, summed and learned from by
DDPO. The experts are an example of rewards of one's own, one of each kind: configs/fashion_rewards/. The prompts' file
gives each its outfit and its wearer's history.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import compressibility
from ddpo_jax.config import choose_variant

REWARDS = (
    "device:configs.fashion_rewards.quality:product_photo",
    "metadata:configs.fashion_rewards.compatibility:harmony",
    "maker:configs.fashion_rewards.personalisation:make",
)


def get_config() -> ConfigDict:
    config = choose_variant(compressibility.get_config(), compressibility.VARIANTS, "lora")
    config.prompts.name = str(Path(__file__).parent / "fashion_rewards" / "outfits.jsonl")
    config.reward.name = ",".join(REWARDS)
    config.reward.standardise = True
    config.reward.clip_model = "openai/clip-vit-large-patch14"
    return config
