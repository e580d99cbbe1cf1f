"""Diffusion-DPO on the model's own pictures: of eight of a prompt the two best against the two worst.

python -m ddpo_jax.main --config=configs/online_dpo.py --config.pretrained.model=FOLDER_OR_HUB_ID

Nobody has published such a run of Stable Diffusion with its numbers. β is that of diffusion_dpo.py, the sampler that of
the DDPO paper: take it as a start. Pairs are mined as in ADHMR (2025) and FashionDPO (2025); PickScore says which
pictures are best, or with `majority` the votes of three experts.
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "majority": {
        "dpo.vote": "majority",
        "reward.name": "pickscore,image_reward,aesthetic_score",
        "reward.imagereward_model": "zai-org/ImageReward",
        "reward.imagereward_tokenizer": "google-bert/bert-base-uncased",
        "reward.aesthetic_clip": "openai/clip-vit-large-patch14",
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.algorithm = "online_dpo"
    config.num_epochs = 100
    config.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.prompts.name = "animal_activities"
    config.prompts.held_out = 0.2
    config.reward.name = "pickscore"
    config.reward.pickscore_model = "yuvalkirstain/PickScore_v1"
    config.dpo.beta = 5000.0
    config.dpo.num_pairs = 2
    config.sample.num_prompts = 64
    config.sample.num_samples_per_prompt = 8
    config.train.num_noise_draws = 4
    config.train.num_updates = 4
    config.train.lora_rank = 16
    config.train.learning_rate = 1e-4
    config.train.adam_weight_decay = 1e-2
    config.train.micro_batch_size = 4
    return choose_variant(config, VARIANTS, variant)
