"""The embedded model towards pictures that fit their prompts, scored by the embedded CLIP.

python -m ddpo_jax.main --config=configs/quick_alignment.py

It has learned to draw "a fox". Asked for "fox in the wild", a form that it never saw, it mostly draws blurs: alignment
has something to teach. The CLIP compares each picture with "a fox in the wild": the end is new to it too, and yet of
all animals it finds this text most like "a fox". A classifier that was trained apart from the CLIP looks on: the share
of the pictures in which it recognises the animal counts nothing, and shows whether the score is gained by the right
animals, or by fooling the CLIP. What learns is LoRA on the cross-attention, through which the prompt comes in.
"""

from ml_collections import ConfigDict

from configs import quickstart
from ddpo_jax.tiny.render import ANIMALS


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.num_epochs = 60
    config.eval_every = 15
    config.prompts.list = tuple(f"{animal} in the wild" for animal in ANIMALS)
    config.reward.name = "clip_score,ddpo_jax.tiny.judge:recognised"
    config.reward.clip_model = "tiny"
    config.reward.clip_template = "a {}"
    config.reward.weights = (1.0, 0.0)
    # Each animal asks for another change, where the JPEG rewards ask for the same of all: it takes more pictures.
    config.sample.num_prompts = 32
    # A picture is the right animal or another by the end of the first step; of the second the gradient is mostly noise.
    config.train.min_timestep = 700
    # The gradient is clearer there than over all weights, most of which have no say in what a word means.
    config.train.lora_rank = 8
    config.train.lora_targets = r"attn2/(to_k|to_v|to_out_0)/kernel$"
    config.train.adam_epsilon = 1e-8
    config.train.learning_rate = 1.4e-3
    config.train.num_decay_steps = config.num_epochs * config.train.num_updates
    return config
