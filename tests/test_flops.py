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
    plain, longer = counted(small_folder), counted(small_folder, **{"sample.num_steps": 5})
    forward = (longer.rollout - plain.rollout) / 3
    assert 0 < 2 * forward < plain.rollout and longer.row == plain.row
    assert plain.row == pytest.approx(3 * forward, rel=0.05)  # the first layer's input has no gradient
    guided = counted(small_folder, **{"sample.guidance_scale": 5.0})
    assert guided.rollout - plain.rollout == 2 * forward and guided.row == pytest.approx(2 * plain.row, rel=0.02)
    lora = counted(small_folder, **{"train.lora_rank": 2})
    assert 2 * forward < lora.row < plain.row


def test_what_is_computed_twice_is_not_counted(small_folder):
    again = {"train.remat": "full", "train.old_log_prob": "recompute"}
    assert counted(small_folder, **again) == counted(small_folder)


def test_a_round(small_folder):
    config = small(**{"sample.num_prompts": 6, "sample.num_samples_per_prompt": 2, "train.num_inner_epochs": 3})
    assert flops.Work(100, 10).of_round(config, rows_per_sample=1.5) == 12 * 100 + 3 * 12 * 1.5 * 10
