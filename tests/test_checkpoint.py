"""Checkpoints: bit-exact, kept in number, and never torn by a signal."""

import os
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import checkpoint
from ddpo_jax.errors import UserError


class Tree(NamedTuple):
    """The kinds of leaves that a TrainState has."""

    count: np.ndarray
    params: dict
    none: None
    empty: tuple


def tree(seed):
    values = jax.random.normal(jax.random.key(seed), (3, 4))
    return Tree(np.array(seed, np.int32), {"a": {"kernel": values}, "b": values.astype(jnp.bfloat16)}, None, ())


def test_restored_is_bit_identical_and_only_the_newest_are_kept(tmp_path):
    with checkpoint.open_manager(tmp_path / "checkpoints", keep=2) as manager:
        assert checkpoint.restore_latest(manager, tree(0)) is None
        for step in (1, 2, 3):
            checkpoint.save(manager, step, tree(step))
        checkpoint.save(manager, 3, tree(9))  # there already
    with checkpoint.open_manager(tmp_path / "checkpoints", keep=2) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        found = checkpoint.restore_latest(manager, tree(0))
    assert jax.tree.structure(found) == jax.tree.structure(tree(3))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(tree(3)), strict=True):
        assert leaf.dtype == expected.dtype and np.array_equal(leaf, expected)


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    other = tree(1)._replace(params={"a": {"kernel": jnp.zeros((5, 4))}, "b": jnp.zeros((3, 4), jnp.bfloat16)})
    with checkpoint.open_manager(tmp_path / "checkpoints", keep=2) as manager:
        checkpoint.save(manager, 1, tree(1))
    with (
        checkpoint.open_manager(tmp_path / "checkpoints", keep=2) as manager,
        pytest.raises(UserError, match=r"checkpoint 1 is of another model than this one.*--workdir"),
    ):
        checkpoint.restore_latest(manager, other)


def test_a_host_copy_outlives_its_source():
    source = {"x": np.zeros(3), "y": jnp.ones(2)}
    copy = checkpoint.host_copy(source)
    source["x"] += 1
    assert (copy["x"] == 0).all() and isinstance(copy["y"], np.ndarray)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_a_save(number, tmp_path, monkeypatch):
    def raise_interrupted(number, frame):
        raise Interrupted

    before = signal.signal(number, raise_interrupted)
    try:
        with checkpoint.open_manager(tmp_path / "checkpoints", keep=2) as manager:
            save = manager.save

            def save_amid_signals(step, args):
                os.kill(os.getpid(), number)
                return save(step, args=args)

            monkeypatch.setattr(manager, "save", save_amid_signals)
            with pytest.raises(Interrupted):
                checkpoint.save(manager, 4, tree(4))
            assert signal.getsignal(number) is raise_interrupted
        assert manager.latest_step() == 4
    finally:
        signal.signal(number, before)
