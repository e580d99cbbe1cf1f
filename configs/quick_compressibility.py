"""The embedded model towards pictures that JPEG compresses well, by LoRA.

python -m ddpo_jax.main --config=configs/quick_compressibility.py
python -m ddpo_jax.main --config=configs/quick_compressibility.py:kl
python -m ddpo_jax.main --config=configs/quick_compressibility.py:kl_budget

Followed far enough, this reward leaves flat pictures without an animal, as the paper warns (Black et al. 2023,
Sec. 6.1). `kl` holds the model near the pretrained one by a penalty; `kl_budget` stops when it has gone so far. The
share of the pictures in which a convnet still finds the animal is looked at, and counts nothing.
"""

from ml_collections import ConfigDict

from configs import quick_lora
from ddpo_jax.config import choose_variant

VARIANTS = {
    "kl": {"train.kl_weight": 0.08},
    "kl_budget": {"train.kl_budget": 0.02},
}


def get_config(variant: str = "") -> ConfigDict:
    config = quick_lora.get_config()
    config.reward.name = "jpeg_compressibility,ddpo_jax.tiny.judge:recognised"
    config.reward.weights = (1.0, 0.0)
    config.num_epochs = 20
    config.eval_every = 5
    return choose_variant(config, VARIANTS, variant)
