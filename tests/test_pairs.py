"""The pairs command: what it prefers, and that others can read it."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpo_jax import pairs, preferences

STEPS = {"num_steps": 2, "chunk_size": 4, "compilation_cache": ""}


def run(capsys, small_folder, output, *arguments, **flags):
    """The exit status, what was said, and the rows of pairs.jsonl."""
    given = {"model": small_folder, "output": output, "prompts": "common_animals", **STEPS, **flags}
    if "reward" not in given:
        given["reward"] = "scorers:brightness"
    status = pairs.main([*arguments, *(f"--{name}={value}" for name, value in given.items())])
    path = output / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return status, capsys.readouterr(), rows


def brightness_of(folder, name):
    return np.asarray(Image.open(folder / name)).mean() / 255


def darkness(images, prompts):
    return -images.mean(axis=(1, 2, 3))


def at_times(images, prompts):
    """The same for all but some prompts."""
    return np.where([prompt[-1] in "gtrn" for prompt in prompts], images.mean(axis=(1, 2, 3)), 1.0)


def same(images, prompts):
    return np.ones(len(images))


@pytest.fixture(scope="module")
def made(small_folder, tmp_path_factory):
    """A folder of 20 pairs."""
    output = tmp_path_factory.mktemp("made")
    flags = {"model": small_folder, "output": output, "prompts": "common_animals", "reward": "scorers:brightness"}
    assert pairs.main([f"--{name}={value}" for name, value in (STEPS | flags | {"num_pairs": 20}).items()]) == 0
    return output


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_labels_are_what_the_reward_says_of_the_files(made):
    rows = rows_of(made)
    assert len(rows) == 20 and len({row["prompt"] for row in rows}) == 20  # one pass over the set's 45, shuffled
    for row in rows:
        values = [brightness_of(made, row[f"image_{i}"]) for i in range(2)]
        np.testing.assert_allclose([row["reward_0"], row["reward_1"]], values, rtol=1e-5)
        assert row["label"] == float(values[0] > values[1])
    assert 4 <= sum(row["label"] for row in rows) <= 16
    settings = json.loads((made / "settings.json").read_text())
    assert settings["ties"] == 0 and settings["num_steps"] == 2 and settings["labels"] == "reward"
    assert len(list(made.iterdir())) == 42


def test_the_folder_is_a_source_of_preferences(made):
    source = preferences.open_source(str(made), resolution=16)
    assert source.length == 20
    pair, row = source.get(3), rows_of(made)[3]
    assert (pair.prompt, pair.label) == (row["prompt"], row["label"])
    np.testing.assert_array_equal(pair.image_0, np.asarray(Image.open(made / row["image_0"])))
    batch = preferences.make_batch(source, batch_size=8, seed=0, epoch=0, resolution=16, horizontal_flip=False)
    brightness = batch.images.mean(axis=(2, 3, 4))
    brighter = brightness[:, 0] > brightness[:, 1]
    np.testing.assert_array_equal(batch.labels, brighter)


def test_controls_have_the_same_pictures_and_other_labels(made, small_folder, tmp_path, capsys):
    own = rows_of(made)
    for labels in ("flipped", "shuffled"):
        status, said, rows = run(capsys, small_folder, tmp_path / labels, num_pairs=20, labels=labels)
        assert status == 0 and "20 pairs" in said.out
        assert [row["reward_0"] for row in rows] == [row["reward_0"] for row in own]
        for row in rows[:3]:
            assert (tmp_path / labels / row["image_0"]).read_bytes() == (made / row["image_0"]).read_bytes()
        given, first = [row["label"] for row in rows], [row["label"] for row in own]
        if labels == "flipped":
            assert given == [1 - label for label in first]
        else:
            assert given != first and sorted(given) == sorted(first)


def test_pairs_do_not_depend_on_the_chunks(made, small_folder, tmp_path, capsys):
    _, _, rows = run(capsys, small_folder, tmp_path, num_pairs=5, chunk_size=6)
    for row, own in zip(rows, rows_of(made), strict=False):
        assert row["prompt"] == own["prompt"]
        np.testing.assert_allclose(
            sorted([row["reward_0"], row["reward_1"]]), sorted([own["reward_0"], own["reward_1"]]), atol=1 / 255
        )


def test_the_best_against_the_worst_of_several(made, small_folder, tmp_path, capsys):
    _, _, rows = run(capsys, small_folder, tmp_path / "four", num_pairs=20, num_samples=4)

    def gap(row):
        return abs(row["reward_0"] - row["reward_1"])

    assert np.mean([gap(row) for row in rows]) > 1.3 * np.mean([gap(row) for row in rows_of(made)])


def test_ties_are_drawn_again_and_told(small_folder, tmp_path, capsys):
    status, said, rows = run(capsys, small_folder, tmp_path, num_pairs=6, reward="test_pairs:at_times")
    assert status == 0 and len(rows) == 6 and all(row["prompt"][-1] in "gtrn" for row in rows)
    assert "draws that are ties, 0 without scores" in said.out
    assert json.loads((tmp_path / "settings.json").read_text())["ties"] > 0


def test_weights_decide_between_rewards(small_folder, tmp_path, capsys):
    both = "scorers:brightness,test_pairs:darkness"
    _, _, rows = run(capsys, small_folder, tmp_path, num_pairs=4, reward=both, weights="1,3")
    for row in rows:
        values = [brightness_of(tmp_path, row[f"image_{i}"]) for i in range(2)]
        assert row["label"] == float(values[0] < values[1])
        assert row["reward_0"] == pytest.approx(-2 * values[0], rel=1e-4)


def test_a_reward_that_prefers_nothing_stops(small_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "PATIENCE", (2, 4))
    status, said, rows = run(capsys, small_folder, tmp_path, num_pairs=4, reward="test_pairs:same")
    assert status == 3 and not rows and "draws gave 0 pairs" in said.err and "tells pictures apart" in said.err


WRONG = {
    "one picture": ({"num_samples": 1}, "--num_samples=1: expected 2 or more"),
    "no pairs": ({"num_pairs": 0}, "--num_pairs=0: expected 1 or more"),
    "weights": ({"weights": "1,2"}, "--weights=1,2: expected a number for each of scorers:brightness"),
    "no weight": ({"weights": "x"}, "--weights=x: expected a number"),
    "no reward": ({"reward": "bright"}, "--reward: there is no reward 'bright'"),
    "no prompts": ({"prompts": "/nowhere.txt"}, "--prompts='/nowhere.txt'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line_before_anything_is_drawn(small_folder, tmp_path, capsys, changes, message):
    status, said, rows = run(capsys, small_folder, tmp_path / "out", **changes)
    last = said.err.splitlines()[-1]
    assert status == 2 and not rows and last.startswith("error: ") and message in last, said.err
    assert not (tmp_path / "out").exists()


def test_pairs_that_are_there_are_kept(made, small_folder, capsys):
    before = (made / "pairs.jsonl").read_text()
    assert run(capsys, small_folder, made)[0] == 2 and (made / "pairs.jsonl").read_text() == before
