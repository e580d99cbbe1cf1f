"""Reward backpropagation as AlignProp trains it (Prabhudesai et al. 2023): aesthetics, by LoRA.

python -m ddpo_jax.main --config=configs/reward_backprop.py --config.pretrained.model=FOLDER_OR_HUB_ID \\
    --config.reward.aesthetic_model=sac+logos+ava1-l14-linearMSE.pth
python -m ddpo_jax.main --config=configs/reward_backprop.py:hps --config.prompts.name=PROMPTS.txt \\
    --config.reward.hpsv2_model=FOLDER

As mihirp1998/AlignProp (config/align_prop.py): LoRA of rank 4, deterministic DDIM with guidance 7.5, the gradient
through a random number of the last steps, up to all 50, batches of 128. `hps` is their run on HPSv2, whose prompts are
a file of yours. `draft1` is DRaFT-1 (Clark et al. 2024): the last step alone, a fraction of the memory and the time.
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "hps": {"reward.name": "hpsv2"},
    "draft1": {"backprop.min_steps": 1, "backprop.max_steps": 1},
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.algorithm = "reward_backprop"
    config.num_epochs = 200
    config.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.prompts.name = "common_animals"
    config.reward.name = "aesthetic_score"
    config.reward.aesthetic_clip = "openai/clip-vit-large-patch14"
    config.backprop.min_steps = 0
    config.backprop.max_steps = 50
    config.sample.eta = 0.0
    config.sample.guidance_scale = 7.5
    config.train.num_updates = 2
    config.train.lora_rank = 4
    config.train.learning_rate = 1e-3
    config.train.adam_weight_decay = 0.1
    config.train.max_grad_norm = 5.0
    config.train.micro_batch_size = 1
    config.train.remat = "full"
    return choose_variant(config, VARIANTS, variant)
