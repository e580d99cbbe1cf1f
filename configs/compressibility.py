"""The DDPO paper's compressibility run: pictures that make small JPEGs (Black et al. 2023, Sec. 5 and App. D).

python -m ddpo_jax.main --config=configs/compressibility.py --config.pretrained.model=FOLDER_OR_HUB_ID
python -m ddpo_jax.main --config=configs/compressibility.py:lora --config.pretrained.model=FOLDER_OR_HUB_ID

The first has the hyperparameters of the authors' jannerm/ddpo: full fine-tuning, 256 samples and 4 updates a round. It
ran in float32 on TPU v4. `lora` has those of their kvablack/ddpo-pytorch (config/dgx.py), which ran in float16 on 8
A100s. --config.compute_dtype=bfloat16 is several times faster on a GPU, and then recomputes the old log-probs.
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "lora": {
        "num_epochs": 100,
        "train.lora_rank": 4,
        "train.learning_rate": 3e-4,
        "train.adv_clip_max": 5.0,
        "per_prompt_stat_tracking.buffer_size": 16,
    }
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.num_epochs = 200
    config.pretrained.model = "CompVis/stable-diffusion-v1-4"
    config.prompts.name = "imagenet_animals"
    config.reward.name = "jpeg_compressibility"
    config.sample.num_steps = 50
    config.sample.eta = 1.0
    config.sample.guidance_scale = 5.0
    config.sample.num_prompts = 256
    config.sample.num_samples_per_prompt = 1
    config.train.micro_batch_size = 4
    config.train.num_updates = 4
    config.train.num_inner_epochs = 1
    config.train.learning_rate = 1e-5
    config.train.adam_weight_decay = 1e-4
    config.train.clip_range = 1e-4
    config.train.adv_clip_max = 10.0
    config.per_prompt_stat_tracking.buffer_size = 32
    config.per_prompt_stat_tracking.min_count = 16
    return choose_variant(config, VARIANTS, variant)
