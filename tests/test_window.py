"""Which steps are noisy: as many as asked for, where asked for, or where it is drawn; and what is refused."""

import jax
import numpy as np
import pytest

from ddpo_jax import window
from ddpo_jax.errors import UserError

TIMESTEPS = np.array([801.0, 601, 401, 201, 1, -199])


def make(size, start=window.ANEW, min_timestep=0):
    return window.make(TIMESTEPS, size=size, start=start, min_timestep=min_timestep)


def test_off_says_nothing_so_that_every_step_is_noisy():
    assert make(0)(jax.random.key(0)) is None


@pytest.mark.parametrize(("size", "start"), [(1, 0), (2, 3), (5, 0), (1, 4)])
def test_a_window_lies_where_it_is_put(size, start):
    for seed in range(3):
        assert np.flatnonzero(make(size, start)(jax.random.key(seed))).tolist() == list(range(start, start + size))


@pytest.mark.parametrize(
    ("size", "min_timestep", "starts"), [(1, 0, 5), (2, 0, 4), (2, 401, 2), (3, 401, 1), (5, 0, 1)]
)
def test_a_drawn_window_is_whole_and_learned_from_and_lies_everywhere(size, min_timestep, starts):
    drawn = np.array([make(size, min_timestep=min_timestep)(jax.random.key(seed)) for seed in range(200)])
    assert (drawn.sum(axis=1) == size).all()
    first = drawn.argmax(axis=1)
    assert all(row[begin : begin + size].all() for row, begin in zip(drawn, first, strict=True))
    assert np.all(TIMESTEPS[first + size - 1] >= min_timestep)
    counts = np.bincount(first, minlength=starts)
    assert len(counts) == starts and np.all(np.abs(counts - 200 / starts) < 5 * np.sqrt(200 / starts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 6}, r"sample\.window=6: expected 0 \(off\) to 5"),
        ({"size": -1}, r"sample\.window=-1"),
        (
            {"size": 3, "min_timestep": 500},
            "to 2, the steps of sample.num_steps=5 that begin at train.min_timestep=500",
        ),
        ({"size": 3, "start": 0, "min_timestep": 500}, r"sample\.window=3"),
        (
            {"size": 0, "start": 0},
            r"sample\.window_start=0: expected -1 \(drawn anew in each round\), as sample\.window=0",
        ),
        ({"size": 2, "start": 4}, r"sample\.window_start=4: expected -1 .* to 3"),
        ({"size": 2, "start": -2}, r"sample\.window_start=-2"),
        ({"size": 1, "start": 2, "min_timestep": 500}, r"sample\.window_start=2: expected -1 .* to 1"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
