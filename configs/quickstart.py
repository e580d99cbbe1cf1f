"""DDPO on the embedded model, on a laptop: JPEG incompressibility, minutes on 2 cores.

python -m ddpo_jax.main --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.num_epochs = 21
    config.checkpoint_every = 5
    config.eval_every = 7
    config.prompts.name = "common_animals"
    config.prompts.held_out = 0.2
    config.reward.name = "jpeg_incompressibility"
    config.sample.num_steps = 4
    config.sample.guidance_scale = 1.0
    config.sample.num_prompts = 16
    config.sample.num_samples_per_prompt = 8
    # At a prompt, most of the reward's variance comes from the initial noise, and no step has earned that.
    config.sample.shared_noise = True
    config.per_prompt_stat_tracking.buffer_size = 0
    config.sample.chunk_size = 64
    # Adam moves every weight alike, most of them on noise. With an epsilon above most gradients a weight moves as far
    # as its gradient says, and at the same gain the control of benchmarks/recipes.py drifts less.
    config.train.adam_epsilon = 3e-4
    config.train.learning_rate = 9e-5
    config.train.num_warmup_steps = 8
    config.train.clip_range = 5e-3
    config.train.num_updates = 4
    config.train.micro_batch_size = 64
    # What so small a model keeps for its gradient fits, and to compute it again takes a tenth longer.
    config.train.remat = "none"
    # Two of the four steps: base.py says what is wrong with the third, and the fourth decides next to nothing.
    config.train.min_timestep = 500
    return config
