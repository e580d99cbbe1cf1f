"""Diffusion-DPO on Pick-a-Pic (Wallace et al. 2023), with the hyperparameters of the authors' launchers.

python -m ddpo_jax.main --config=configs/diffusion_dpo.py --config.data.source=PREPARED_PICK_A_PIC
python -m ddpo_jax.main --config=configs/diffusion_dpo.py:sdxl --config.data.source=PREPARED_PICK_A_PIC

As SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh and sdxl.sh: 2048 pairs an update, 2000 updates, a learning rate
of 1e-8 times the batch, β = 5000 (before a ½; the paper's text says 2000). They ran in float16 on 16 A100s. A round is
one update here. python -m ddpo_jax.prepare --from=pick_a_pic makes the data set. `lora` trains adapters, and keeps no
second UNet for the reference; `kto` learns from each picture by itself. These two have no published numbers.
"""

from ml_collections import ConfigDict

from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {
    "sdxl": {
        "pretrained.model": "stabilityai/stable-diffusion-xl-base-1.0",
        "compute_dtype": "bfloat16",
        "train.optimizer": "adafactor",
        "train.num_warmup_steps": 200,
        "train.remat": "full",
        "train.micro_batch_size": 1,
        "sample.chunk_size": 1,
    },
    "lora": {"train.lora_rank": 16, "train.learning_rate": 1e-4},
    "kto": {"dpo.loss": "kto", "dpo.beta": 1000.0},
}


def get_config(variant: str = "") -> ConfigDict:
    config = base.get_config()
    config.algorithm = "diffusion_dpo"
    config.num_epochs = 2000
    config.checkpoint_every = 50
    config.eval_every = 200
    config.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.reward.name = "pickscore"
    config.reward.pickscore_model = "yuvalkirstain/PickScore_v1"
    config.data.source = "data/pick_a_pic"
    config.data.batch_size = 2048
    config.data.prompt_dropout = 0.2
    config.data.horizontal_flip = True
    config.dpo.beta = 5000.0
    config.sample.guidance_scale = 7.5
    config.train.num_updates = 1
    config.train.learning_rate = 2.048e-5
    config.train.num_warmup_steps = 500
    config.train.adam_weight_decay = 1e-2
    config.train.micro_batch_size = 4
    return choose_variant(config, VARIANTS, variant)
