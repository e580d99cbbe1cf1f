"""The DDPO paper's aesthetic run: pictures that LAION's aesthetic predictor likes (Black et al. 2023, Sec. 5, App. D).

python -m ddpo_jax.main --config=configs/aesthetic.py --config.pretrained.model=FOLDER_OR_HUB_ID \\
    --config.reward.aesthetic_model=sac+logos+ava1-l14-linearMSE.pth
python -m ddpo_jax.main --config=configs/aesthetic.py:lora ... the same

The file is that of github.com/christophschuhmann/improved-aesthetic-predictor; its CLIP comes from the hub.
What differs from compressibility.py is as in jannerm/ddpo (a_animals), for `lora` as in kvablack/ddpo-pytorch
(config/dgx.py).
"""

from ml_collections import ConfigDict

from configs import compressibility
from ddpo_jax.config import choose_variant

VARIANTS = {
    "lora": {
        **compressibility.VARIANTS["lora"],
        "num_epochs": 200,
        "train.num_updates": 2,
        "per_prompt_stat_tracking.buffer_size": 32,
    }
}


def get_config(variant: str = "") -> ConfigDict:
    config = compressibility.get_config()
    config.prompts.name = "common_animals"
    config.reward.name = "aesthetic_score"
    config.reward.aesthetic_clip = "openai/clip-vit-large-patch14"
    return choose_variant(config, VARIANTS, variant)
