"""Diffusion-DPO of the embedded model on 2,000 pairs of its own pictures, in minutes on 2 cores.

python -m ddpo_jax.pairs --model=tiny --prompts=common_animals --split=train --held_out=0.2 \\
    --reward=jpeg_incompressibility --num_pairs=2000 --num_steps=10 --guidance_scale=1 --eta=1 --output=data/quick_pairs
python -m ddpo_jax.main --config=configs/quick_dpo.py

The pairs are of the prompts that it trains on; it is evaluated on those that are held out. Controls: pairs whose labels
are flipped or shuffled (ddpo_jax.pairs --labels=...).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.algorithm = "diffusion_dpo"
    config.num_epochs = 8
    config.checkpoint_every = 4
    config.eval_every = 4
    config.prompts.name = "common_animals"
    config.prompts.held_out = 0.2
    config.reward.name = "jpeg_incompressibility"
    config.data.source = "data/quick_pairs"
    config.data.batch_size = 500
    config.data.prompt_dropout = 0.0
    config.dpo.beta = 500.0
    config.sample.num_steps = 10
    config.sample.guidance_scale = 1.0
    config.sample.chunk_size = 64
    config.train.num_updates = 8
    config.train.learning_rate = 1e-4
    config.train.num_warmup_steps = 8
    config.train.micro_batch_size = 64
    return config
