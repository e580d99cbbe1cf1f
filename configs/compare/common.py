"""What the methods of the comparison share: the embedded model, one differentiable reward, and how often it is asked.

The reward is the estimate of a JPEG's size, which has a gradient. Two more are only watched: the size of the file
itself, and the share of the pictures in which a classifier still finds the animal, which over-optimisation costs. Grey
pictures cannot win. Each round asks for the reward of 128 pictures, 20 rounds for 2560. Prompts, the sampler and the
start are the same for all; hyperparameters are each method's own.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.num_epochs = 20
    config.checkpoint_every = 20
    config.eval_every = 4
    config.prompts.name = "common_animals"
    config.prompts.held_out = 0.2
    names = ("jpeg_incompressibility_estimate", "jpeg_incompressibility", "ddpo_jax.tiny.judge:recognised")
    config.reward.name = ",".join(names)
    config.reward.weights = (1.0, 0.0, 0.0)
    config.sample.num_steps = 4
    config.sample.guidance_scale = 1.0
    config.sample.num_prompts = 16
    config.sample.num_samples_per_prompt = 8
    config.sample.chunk_size = 64
    config.per_prompt_stat_tracking.buffer_size = 0
    config.train.adam_epsilon = 1e-8
    config.train.micro_batch_size = 64
    config.train.num_warmup_steps = 8
    return config
