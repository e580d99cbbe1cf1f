"""A run's folder: one run at a time, one config for ever, and nothing left of a run that did not begin."""

import json

import pytest

from ddpo_jax.errors import UserError
from ddpo_jax.workdir import MAY_DIFFER, claim, flatten, write_atomically

CONFIG = {"num_epochs": 3, "train": {"learning_rate": 1e-4, "num_updates": 2}, "weights": (1.0, 2.0)}


def with_round(workdir, config=CONFIG):
    """A folder in which a run finished a round."""
    with claim(workdir, config) as keep_config:
        keep_config()
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    return workdir


def test_flatten():
    assert flatten(CONFIG) == {
        "num_epochs": 3,
        "train.learning_rate": 1e-4,
        "train.num_updates": 2,
        "weights": [1.0, 2.0],
    }


def test_the_config_is_kept(tmp_path):
    with claim(tmp_path / "a" / "b", CONFIG) as keep_config:
        keep_config()
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == flatten(CONFIG)


def test_nothing_stays_of_a_run_that_did_not_begin(tmp_path):
    with claim(tmp_path / "a" / "b", CONFIG):
        pass
    with pytest.raises(UserError, match="reward"), claim(tmp_path / "a" / "b", CONFIG):
        raise UserError("reward")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with claim(tmp_path / "a", CONFIG):
        pass
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_another_config_is_refused_with_its_keys(tmp_path):
    workdir = with_round(tmp_path / "a")
    other = {**CONFIG, "train": {"learning_rate": 2e-4, "num_updates": 2}}
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.0001 there, 0\.0002 now") as error:
        claim(workdir, other).__enter__()
    assert "num_updates" not in str(error.value)
    assert json.loads((workdir / "config.json").read_text()) == flatten(CONFIG)


def test_what_may_differ_is_written_anew(tmp_path):
    assert "num_epochs" in MAY_DIFFER
    workdir = with_round(tmp_path / "a")
    with claim(workdir, {**CONFIG, "num_epochs": 9}) as keep_config:
        keep_config()
    assert json.loads((workdir / "config.json").read_text())["num_epochs"] == 9


def test_a_folder_without_a_whole_round_may_be_taken_over(tmp_path):
    with claim(tmp_path / "a", CONFIG) as keep_config:
        keep_config()
    with claim(tmp_path / "a", {**CONFIG, "weights": ()}) as keep_config:
        keep_config()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["weights"] == []


def test_a_broken_config_is_an_error(tmp_path):
    workdir = with_round(tmp_path / "a")
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        claim(workdir, CONFIG).__enter__()


def test_the_second_run_is_refused_and_the_first_goes_on(tmp_path):
    with claim(tmp_path / "a", CONFIG) as keep_config:
        with pytest.raises(UserError, match="another run is in it"):
            claim(tmp_path / "a", CONFIG).__enter__()
        keep_config()
    with claim(tmp_path / "a", CONFIG):
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    # Root may write anywhere, but not below a file.
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        claim(tmp_path / "file" / "a", CONFIG).__enter__()


def test_write_atomically_replaces(tmp_path):
    for text in ("one\n", "two\n"):
        write_atomically(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
