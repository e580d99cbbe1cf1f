"""DDPO on Stable Diffusion XL at 1024 pixels, by LoRA in bfloat16, within 24 GB: JPEG compressibility.

XLA_PYTHON_CLIENT_MEM_FRACTION=.92 python -m ddpo_jax.main --config=configs/sdxl.py

The optimizer and the prompts are those of ddpo-pytorch's compressibility run on SD 1.5, with 20 steps instead of 50
and half its 256 samples a round. Nobody has published such a run on XL, and this one was not run at full size either:
take it as a start.
benchmarks/memory.py gives the bytes; the variable lets JAX take more of a 24 GB card than its usual three quarters.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.compute_dtype = "bfloat16"
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.variant = "fp16"
    config.prompts.name = "imagenet_animals"
    config.reward.name = "jpeg_compressibility"
    config.sample.num_steps = 20
    config.sample.num_prompts = 128
    config.sample.chunk_size = 1
    config.eval_prompts = 16
    config.train.lora_rank = 4
    config.train.learning_rate = 3e-4
    config.train.num_updates = 4
    config.train.micro_batch_size = 1
    config.train.remat = "full"
    config.per_prompt_stat_tracking.buffer_size = 16
    config.per_prompt_stat_tracking.min_count = 16
    return config
