"""The analysis of a run's work: what follows from its steps, its guidance and what it trains."""

import pytest

from benchmarks import flops
from configs import base


def small(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({"sample.num_steps": 2, "sample.guidance_scale": 1.0, **changes})
    return config


def counted(folder, **changes):
    return flops.ddpo(small(**{"pretrained.model": str(folder), **changes}))


def test_work_follows_from_steps_guidance_and_what_is_trained(small_folder):
    plain = counted(small_folder)
    longer = counted(small_folder, **{"sample.num_steps": 5})
    forward = (longer.rollout - plain.rollout) / (5 - 2)
    assert 0 < 2 * forward < plain.rollout
    assert plain.row == pytest.approx(3 * forward, rel=0.05)  # the first layer's input has no gradient
    guided = counted(small_folder, **{"sample.guidance_scale": 5.0})
    assert 0.9 * 2 * plain.row < guided.row < 2 * plain.row  # what comes before the first look at the text is shared
    assert 0.9 * 2 * 2 * forward < guided.rollout - plain.rollout + 2 * forward < 2 * 2 * forward
    # adapters spare their kernels' gradients, and nothing that is computed twice is counted
    again = {"train.remat": "full", "train.old_log_prob": "recompute"}
    lora = counted(small_folder, **{"train.lora_rank": 2}, **again)
    assert lora.rollout > plain.rollout and 2 * forward < lora.row < plain.row


def test_a_round(small_folder):
    config = small(**{"sample.num_prompts": 6, "sample.num_samples_per_prompt": 2, "train.num_inner_epochs": 3})
    assert flops.Work(100, 10).of_round(config, rows_per_sample=1.5) == 12 * 100 + 3 * 12 * 1.5 * 10
