import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from ddpo_jax import metrics
from ddpo_jax.errors import UserError


@pytest.fixture
def notes():
    return []


@pytest.fixture
def make(tmp_path, notes):
    def make(first_epoch=0, tensorboard=False, wandb_project=""):
        return metrics.make_writer(
            tmp_path,
            first_epoch=first_epoch,
            num_epochs=10,
            note=notes.append,
            tensorboard=tensorboard,
            wandb_project=wandb_project,
        )

    return make


def strict(line):
    """The row of a line that any JSON reader accepts: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def rows(path):
    return [strict(line) for line in path.read_text().splitlines()]


def pictures(count, size=8):
    return np.random.default_rng(0).random((count, size, size, 3)).astype(np.float32)


# metrics.jsonl


def test_each_epoch_is_one_line_and_there_at_once(make, tmp_path):
    writer = make()
    for epoch in range(3):
        writer.scalars(epoch, {"loss": 0.5, "step": epoch})
        # read before close: a run that is killed here loses nothing
        assert rows(tmp_path / "metrics.jsonl")[epoch] == {"epoch": epoch, "loss": 0.5, "step": epoch}
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"epoch": 0,') and text.endswith("\n")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float64("nan")])
def test_what_is_not_finite_is_null(make, tmp_path, value):
    make().scalars(0, {"bad": value, "good": np.float64(0.5), "count": 3})
    assert rows(tmp_path / "metrics.jsonl") == [{"epoch": 0, "bad": None, "good": 0.5, "count": 3}]


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', '{"epoch": 2, "loss": 0.1', "{", "nul\x00\x00"])
def test_a_torn_last_line_is_dropped(make, tmp_path, torn):
    writer = make()
    writer.scalars(0, {"loss": 0.1})
    writer.scalars(1, {"loss": float("nan")})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    assert [row["epoch"] for row in metrics.read(path)] == [0, 1]
    make(first_epoch=2).scalars(2, {"loss": 0.3})
    assert rows(path) == [{"epoch": 0, "loss": 0.1}, {"epoch": 1, "loss": None}, {"epoch": 2, "loss": 0.3}]


def test_an_epoch_that_is_run_again_is_there_once(make, tmp_path):
    """The checkpoint is older than the log: epochs 2 and 3 ran, and run again."""
    writer = make()
    for epoch in range(4):
        writer.scalars(epoch, {"loss": 1.0})
        writer.evaluation(epoch, "train", {"reward/mean": 1.0}, ["a cat"], np.ones(1))
    again = make(first_epoch=2)
    again.scalars(2, {"loss": 2.0})
    again.evaluation(2, "train", {"reward/mean": 2.0}, ["a cat"], np.ones(1))
    assert [(row["epoch"], row["loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [(0, 1), (1, 1), (2, 2)]
    assert [row["epoch"] for row in rows(tmp_path / "evaluations.jsonl")] == [0, 1, 2]
    assert not list(tmp_path.glob("*.new"))


def test_a_run_from_the_start_forgets_an_earlier_one(make, tmp_path):
    make().scalars(0, {"loss": 1.0})
    make()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_an_evaluation_tells_each_picture_and_the_boards_its_figures(make, tmp_path):
    make().evaluation(0, "train", {"reward/mean": 1.5}, ("a cat", "a dog"), np.array([1.5, np.nan], np.float32))
    assert rows(tmp_path / "evaluations.jsonl") == [
        {"epoch": 0, "prompts": "train", "reward/mean": 1.5, "texts": ["a cat", "a dog"], "rewards": [1.5, None]}
    ]


# the line on the console


def test_the_line_says_what_there_is_and_leaves_out_the_rest(make, notes):
    writer = make()
    writer.scalars(2, {})
    writer.scalars(3, {"reward/mean": 1.25})
    writer.scalars(4, {"reward/mean": 1.25, "reward/std": 0.5, "seconds/rollout": 4.125, "images_per_second": 5.2})
    assert [note.split("  ")[0] for note in notes] == ["epoch 3/10", "epoch 4/10", "epoch 5/10"]
    assert "reward" not in notes[0]
    assert "reward 1.25" in notes[1] and "±" not in notes[1]
    assert "reward 1.25 ± 0.5" in notes[2] and "rollout 4.1 s" in notes[2] and "5.2 images/s" in notes[2]
    assert all("\n" not in note and "left" in note for note in notes)


def test_trouble_is_told_only_where_there_is_some(make, notes):
    writer = make()
    writer.scalars(0, {"reward/missing": 0.0, "skipped_steps": 0.0})
    writer.scalars(1, {"reward/missing": 3.0, "skipped_steps": 2.0, "grad_norm": float("nan")})
    assert "missing" not in notes[0] and "skipped" not in notes[0]
    assert "missing 3" in notes[1] and "skipped 2" in notes[1] and "gradient nan" in notes[1]


@pytest.mark.parametrize(("seconds_left", "said"), [(12.4, "12 s left"), (90.0, "1.5 min left")])
def test_time_left_is_in_a_unit_that_reads_well(seconds_left, said):
    assert metrics.summary(0, 10, {}, seconds_left).endswith(said)


# phases


def test_away_from_a_terminal_there_are_plain_lines_only(capsys):
    console = metrics.make_console(lambda: None)
    for name in ("rollout", "reward", "update"):
        with console.phase(name, 4) as advance:
            advance(2)
            advance(2)
    console.note("a [bold] line :cat: " + "x" * 200)
    assert capsys.readouterr().out == "a [bold] line :cat: " + "x" * 200 + "\n"


def test_seconds_add_up_by_phase_and_start_again_once_read(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 10.0, 11.0, 12.0, 20.0, 21.0, 24.0])  # begin, advance, end
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    console = metrics.make_console(lambda: None)
    for name in ("rollout", "update", "rollout"):
        with console.phase(name, 1) as advance:
            advance(1)
    assert console.seconds() == {"rollout": 5.0, "update": 2.0}
    assert console.seconds() == {}


def test_a_phase_that_is_broken_off_keeps_its_time():
    console = metrics.make_console(lambda: None)
    with pytest.raises(KeyboardInterrupt), console.phase("update", 2):
        raise KeyboardInterrupt
    assert console.seconds().keys() == {"update"}


def test_a_long_phase_says_how_far_it_is(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 45.0, 46.0])
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with metrics.make_console(lambda: None).phase("rollout", 16) as advance:
        for _ in range(3):
            advance(4)
    assert capsys.readouterr().out == "  rollout 8/16  0.2/s  40 s left\n"


# pictures


def test_a_grid_holds_each_picture_enlarged_by_a_whole_factor():
    images = pictures(5, size=64)
    sheet = np.asarray(metrics.grid(images, [f"animal {i}" for i in range(5)]))
    expected = np.rint(images * 255).astype(np.uint8)
    width = sheet.shape[1]
    assert sheet.shape[1] == 3 * (128 + 4) + 4  # 5 pictures: 3 columns, 2 rows
    assert abs(sheet.shape[0] / 2 - width / 3) < 20  # near square tiles
    for i in range(5):
        left, top = 4 + i % 3 * 132, 4 + i // 3 * (128 + metrics.CAPTION + 4)
        tile = sheet[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(tile[::2, ::2], expected[i])
        np.testing.assert_array_equal(tile[1::2, 1::2], expected[i])
        caption = sheet[top + 128 : top + 128 + metrics.CAPTION, left : left + 128]
        assert caption.min() < 128  # ink


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [(8, 8), (43, 43), (64, 64), (40, 64), (128, 128), (200, 130)])
def test_pictures_come_back_out_of_a_grid_to_the_bit(count, size):
    images = np.random.default_rng(0).random((count, *size, 3)).astype(np.float32)
    found = metrics.cut(metrics.grid(images, ["a cat"] * count), count)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in found]), np.rint(images * 255))


def test_flat_pictures_come_back_with_their_colour():
    found = metrics.cut(metrics.grid(np.zeros((3, 64, 64, 3), np.float32), ["a"] * 3), 3)
    assert all(not np.asarray(picture).any() for picture in found)


def test_another_sheet_is_not_cut():
    sheet = metrics.grid(pictures(5, size=64), ["a cat"] * 5)
    with pytest.raises(ValueError, match="no grid of 17 pictures"):
        metrics.cut(sheet, 17)


def test_large_pictures_keep_their_size():
    assert metrics.grid(pictures(1, size=256), ["a cat"]).size == (256 + 8, 256 + metrics.CAPTION + 8)


def test_a_picture_with_bad_pixels_is_still_drawn():
    images = np.full((1, 128, 128, 3), 0.5, np.float32)
    images[0, 0, 0], images[0, 0, 1], images[0, 0, 2] = np.nan, 7.0, -7.0
    sheet = np.asarray(metrics.grid(images, [""]))
    assert [tuple(sheet[4, 4 + i]) for i in range(3)] == [(0,) * 3, (255,) * 3, (0,) * 3]


def test_a_grid_is_written_whole_under_its_epoch(make, tmp_path):
    writer = make()
    writer.images(7, "train", pictures(4), ["a cat", "a dog", "a very long caption " * 9, "猫 ±"])
    writer.images(7, "train", pictures(4), ["a", "b", "c", "d"])
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["train_00007.png"]
    with Image.open(tmp_path / "images" / "train_00007.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.mode == "RGB"


# trackers


@pytest.mark.parametrize(
    ("asked", "module", "extra"),
    [({"tensorboard": True}, "tensorboardX", "tensorboard"), ({"wandb_project": "cats"}, "wandb", "wandb")],
)
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(monkeypatch, make, tmp_path, asked, module, extra):
    make().scalars(0, {"loss": 1.0})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'ddpo_jax\[{extra}\]'"):
        make(**asked)
    assert len(rows(tmp_path / "metrics.jsonl")) == 1  # nothing was dropped


def test_a_tracker_that_is_not_asked_for_is_not_imported(monkeypatch, make):
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    make().close()


def test_tensorboard_gets_scalars_evaluations_and_pictures(make, tmp_path):
    pytest.importorskip("tensorboardX")
    writer = make(tensorboard=True)
    writer.scalars(0, {"loss": 1.0})
    writer.evaluation(0, "train", {"reward/mean": 1.0}, ["a cat"], np.ones(1))
    writer.images(0, "train", pictures(2), ["a", "b"])
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"eval/train/reward/mean" in content and b"PNG" in content
