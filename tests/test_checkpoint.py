"""Checkpoints: bit-exact, kept in number, and never torn by a signal."""

import os
import re
import shutil
import signal
from pathlib import Path
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


def same(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of the checkpoints 1, 2, 3. Do not write to it."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with checkpoint.open_manager(folder, keep=3) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, tree(step))
    return folder


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_the_checkpoint_before_one_that_is_not_whole_is_taken(three, tmp_path, damage):
    """Whichever of its files is hit. What is no part of the arrays may be missed by nobody."""
    files, broken = sorted(path.relative_to(three) for path in (three / "3").rglob("*") if path.is_file()), 0
    for i, file in enumerate(files):
        folder, notes = tmp_path / str(i) / "checkpoints", []
        shutil.copytree(three, folder)
        damage(folder / file)
        with checkpoint.open_manager(folder, keep=3, note=notes.append) as manager:
            found = checkpoint.restore_latest(manager, tree(0))
            if not notes:
                assert same(found, tree(3))
                continue
            broken += 1
            assert same(found, tree(2)) and manager.latest_step() == 2
            checkpoint.save(manager, 3, tree(4))
        assert re.match(r"checkpoint 3 is not whole \(.+\): kept as .*/broken-3, and the one before", *notes)
        assert (folder / "broken-3").is_dir()
        with checkpoint.open_manager(folder, keep=3, note=notes.append) as manager:
            assert same(checkpoint.restore_latest(manager, tree(0)), tree(4)) and len(notes) == 1
    assert broken >= 3


def test_nothing_whole_is_an_error(three, tmp_path):
    """To begin anew would throw away what somebody may still restore."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for file in folder.rglob("*"):
        if file.is_file():
            empty(file)
    with (
        pytest.raises(UserError, match=r"no checkpoint is whole .*; restore one"),
        checkpoint.open_manager(folder, keep=2),
    ):
        pass
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "no"), MemoryError()])
def test_a_disk_that_cannot_be_read_now_costs_nothing(three, tmp_path, monkeypatch, error):
    def fail(path):
        raise error

    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    monkeypatch.setattr(checkpoint, "_read_through", fail)
    with pytest.raises(UserError, match=r"3: could not be read .*; try again"), checkpoint.open_manager(folder, keep=2):
        pass
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3"}


def test_the_best_are_kept_beside_the_newest(tmp_path):
    folder = tmp_path / "checkpoints"
    for scores in ({1: 0.5, 2: 3.0, 3: None, 4: 1.0}, {5: float("nan"), 6: 2.0, 7: 0.0}):
        with checkpoint.open_manager(folder, keep=2, keep_best=1) as manager:
            for step, score in scores.items():
                checkpoint.save(manager, step, tree(step), score=score)
    with checkpoint.open_manager(folder, keep=2, keep_best=1) as manager:
        assert sorted(manager.all_steps()) == [2, 6, 7] and manager.best_step() == 2


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

            def save_amid_signals(step, **options):
                os.kill(os.getpid(), number)
                return save(step, **options)

            monkeypatch.setattr(manager, "save", save_amid_signals)
            with pytest.raises(Interrupted):
                checkpoint.save(manager, 4, tree(4))
            assert signal.getsignal(number) is raise_interrupted
        assert manager.latest_step() == 4
    finally:
        signal.signal(number, before)
