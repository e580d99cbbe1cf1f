"""Advantages against a reference of plain deques, and with rewards missing."""

from collections import deque

import numpy as np
import pytest

from ddpo_jax import advantages
from ddpo_jax.errors import UserError

NAN = np.nan


def reference(rounds, buffer_size, min_count):
    """Per-prompt advantages of a run, sample by sample; rewards all present."""
    history = {}
    for ids, rewards in rounds:
        for prompt, reward in zip(ids, rewards, strict=True):
            history.setdefault(int(prompt), deque(maxlen=buffer_size)).append(float(reward))
        yield [
            (reward - np.mean(among)) / (np.std(among) + 1e-6)
            for prompt, reward in zip(ids, rewards, strict=True)
            for among in [history[int(prompt)] if len(history[int(prompt)]) >= min_count else rewards.astype(float)]
        ]


def random_rounds(num_rounds, num_prompts, batch, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, num_prompts, batch), rng.normal(20, 5, batch).astype(np.float32)) for _ in range(num_rounds)
    ]


# A batch of 40 over 2 prompts overruns a buffer of 8 within one round.
@pytest.mark.parametrize(
    ("num_prompts", "batch", "buffer_size", "min_count"), [(5, 12, 8, 6), (2, 40, 8, 8), (3, 7, 1, 1)]
)
def test_per_prompt_equals_deques(num_prompts, batch, buffer_size, min_count):
    init, update = advantages.per_prompt(num_prompts=num_prompts, buffer_size=buffer_size, min_count=min_count)
    rounds = random_rounds(10, num_prompts, batch)
    carry = init()
    for (ids, rewards), expected in zip(rounds, reference(rounds, buffer_size, min_count), strict=True):
        advantage, weight, carry = update(carry, ids, rewards)
        np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(weight, 1)


def test_per_prompt_by_hand():
    init, update = advantages.per_prompt(num_prompts=3, buffer_size=4, min_count=2)
    advantage, _, carry = update(init(), np.array([2, 0, 2]), np.array([1, 7, 3], np.float32))
    # Prompt 2 has (1, 3): mean 2, std 1. Prompt 0 has one reward, so the batch's (1, 7, 3): mean 11/3, std sqrt(56/9).
    np.testing.assert_allclose(advantage, [-1, (7 - 11 / 3) / np.sqrt(56 / 9), 1], rtol=1e-5)
    np.testing.assert_array_equal(carry.count, [1, 0, 2])


def test_carry_is_not_written_to_and_resumes_as_jax_arrays():
    import jax

    init, update = advantages.per_prompt(num_prompts=4, buffer_size=3, min_count=2)
    first, second = random_rounds(2, 4, 10)
    _, _, carry = update(init(), *first)
    before = [leaf.copy() for leaf in carry]
    advantage, _, after = update(carry, *second)
    for leaf, kept in zip(carry, before, strict=True):
        np.testing.assert_array_equal(leaf, kept)
    resumed, _, after_resumed = update(jax.tree.map(jax.numpy.asarray, carry), *second)
    np.testing.assert_array_equal(resumed, advantage)
    for leaf, other in zip(after, after_resumed, strict=True):
        np.testing.assert_array_equal(leaf, other)
        assert leaf.dtype == other.dtype


MAKERS = {
    "whiten": lambda: advantages.whiten(),
    "per_prompt": lambda: advantages.per_prompt(num_prompts=3, buffer_size=6, min_count=4),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_missing_rewards_change_nothing_for_the_others(maker):
    init, update = MAKERS[maker]()
    rng = np.random.default_rng(1)
    carry, carry_without = init(), init()
    for ids, rewards in random_rounds(6, 3, 14, seed=2):
        present = rng.random(14) > 0.3
        holed = np.where(present, rewards, np.float32(NAN))
        advantage, weight, carry = update(carry, ids, holed)
        without, _, carry_without = update(carry_without, ids[present], rewards[present])
        np.testing.assert_array_equal(advantage[present], without)
        np.testing.assert_array_equal(advantage[~present], 0)
        np.testing.assert_array_equal(weight, present.astype(np.float32))
        assert advantage.dtype == weight.dtype == np.float32
        for leaf, other in zip(carry, carry_without, strict=True):
            np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("make", [*MAKERS.values(), lambda: advantages.per_group(size=2)])
@pytest.mark.parametrize("rewards", [[NAN, NAN], [3.0, NAN], [0.1, 0.1]])
def test_degenerate_batches_are_zero(make, rewards):
    init, update = make()
    advantage, weight, _ = update(init(), np.array([0, 1]), np.array(rewards, np.float32))
    np.testing.assert_array_equal(advantage, 0)
    np.testing.assert_array_equal(weight, np.isfinite(rewards))


def test_whiten_has_mean_0_and_std_1():
    init, update = advantages.whiten()
    ((ids, rewards),) = random_rounds(1, 3, 50)
    advantage, _, _ = update(init(), ids, rewards)
    np.testing.assert_allclose([advantage.mean(), advantage.std()], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(np.argsort(advantage), np.argsort(rewards))


def test_per_group_standardises_each_draw_alone():
    init, update = advantages.per_group(size=3)
    rewards = np.array([1, 2, 6, 50, NAN, 70, 4, 4, 4, NAN, NAN, 9], np.float32)
    advantage, weight, carry = update(init(), np.zeros(len(rewards), int), rewards)
    # (1, 2, 6): mean 3, std sqrt(14/3). (50, 70): mean 60, std 10. Equal rewards, and one alone, say nothing.
    expected = [-2 / np.sqrt(14 / 3), -1 / np.sqrt(14 / 3), 3 / np.sqrt(14 / 3), -1, 0, 1, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(advantage, expected, rtol=1e-4)
    np.testing.assert_array_equal(weight, np.isfinite(rewards))
    assert carry == ()


def test_per_group_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"a group of 1 .*num_samples_per_prompt"):
        advantages.per_group(size=1)
    _, update = advantages.per_group(size=3)
    with pytest.raises(UserError, match="4 rewards are not groups of 3"):
        update((), np.zeros(4, int), np.zeros(4, np.float32))


def test_per_prompt_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="min_count 9 must be from 1 to buffer_size 8"):
        advantages.per_prompt(num_prompts=3, buffer_size=8, min_count=9)
    init, update = advantages.per_prompt(num_prompts=3, buffer_size=8, min_count=2)
    for ids in ([0, 3], [-1, 0]):
        with pytest.raises(UserError, match="list of 3"):
            update(init(), np.array(ids), np.zeros(2, np.float32))


def test_clip():
    np.testing.assert_array_equal(
        advantages.clip(np.array([-7, -1, 5.5], np.float32), adv_clip_max=5.0), np.array([-5, -1, 5], np.float32)
    )
