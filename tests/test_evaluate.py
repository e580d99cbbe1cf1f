"""The evaluate command on small folders and a run: what it finds, writes, says and refuses."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import write_clip, write_folder
from small_run import SMALL

from ddpo_jax import data, evaluate, sample, saved
from ddpo_jax.main import main
from ddpo_jax.report.comparison import first_of_each
from ddpo_jax.rewards import Scores

ROOT = Path(__file__).parents[1]
STEPS = {"num_steps": 2, "chunk_size": 4}
REWARDS = "scorers:brightness,device:scorers:redness"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def workdir(small_folder, tmp_path_factory):
    """A run of one round that held out a fifth of its prompts."""
    path = tmp_path_factory.mktemp("runs") / "bright"
    settings = {"pretrained.model": small_folder, "num_epochs": 1, "eval_every": 0, "compilation_cache": "", **SMALL}
    settings |= {"prompts.held_out": 0.2, "train.learning_rate": 0.1}
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    assert main([f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={path}", *arguments]) == 0
    return path


def run(capsys, output, *arguments, **flags):
    """The exit status, what was said, evaluation.json, the rows of rewards.csv and the page."""
    given = {"output": output, "compilation_cache": "", **STEPS, **flags}
    status = evaluate.main([*arguments, *(f"--{name}={value}" for name, value in given.items())])
    if not (output / "evaluation.json").exists():
        return status, capsys.readouterr(), None, [], ""
    found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    with (output / "rewards.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return status, capsys.readouterr(), found, rows, (output / "evaluation.html").read_text(encoding="utf-8")


def column(rows, name):
    return np.array([float(row[name]) if row[name] else np.nan for row in rows])


def missing_at_first(images, prompts):
    """The first picture of a call has no score."""
    return Scores(np.where(np.arange(len(images)), images.mean(axis=(1, 2, 3)), np.nan), "it is the first")


def test_a_model_against_itself(small_folder, eye, tmp_path, capsys):
    models = {"model": small_folder, "against": small_folder, "features": eye, "reward": REWARDS}
    status, said, found, rows, page = run(capsys, tmp_path / "out", prompts="common_animals", num_prompts=6, **models)
    assert status == 0 and not said.err
    for name in REWARDS.split(","):
        one = found["rewards"][name]
        assert one["difference"] == one["sigmas"] == {"value": 0, "low": 0, "high": 0}
        assert one["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5} and one["count"] == 6 and not one["missing"]
        assert one["model"] == one["against"]
        np.testing.assert_array_equal(column(rows, f"{name}/model"), column(rows, f"{name}/against"))
        assert one["model"]["value"] == pytest.approx(column(rows, f"{name}/model").mean())
    assert found["diversity"]["difference"]["overall"] == {"value": 0, "low": 0, "high": 0}
    assert found["diversity"]["model"]["overall"]["value"] > 0
    assert found["diversity"]["model"]["within"]["value"] is None  # one picture a prompt
    assert page.count("<img ") == 12 and page.count('src="data:image/') == 12 and "http" not in page
    assert "Biggest gains" not in page and "is equal to" in page
    assert "win rate 50.0 % (50.0 to 50.0) of 6 pairs" in said.out and "6 pictures each" in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.html", "rewards.csv"}


def test_the_pictures_are_those_of_sample(small_folder, tmp_path, capsys):
    """The same prompts, seed and settings; brightness tells them apart, and is read off the files."""
    prompts = ["--prompt=a dog", "--prompt=an owl", "--prompt=a fox"]
    more = {"seed": 3, "num_images": 2, "eta": 1.0, **STEPS}
    flags = [f"--{name}={value}" for name, value in more.items()]
    drawn = tmp_path / "drawn"
    assert sample.main([f"--model={small_folder}", f"--output={drawn}", "--compilation_cache=", *prompts, *flags]) == 0
    _, _, found, rows, page = run(
        capsys, tmp_path / "out", *prompts, model=small_folder, reward="scorers:brightness", **more
    )
    expected = [np.asarray(Image.open(drawn / f"{i:05d}.png")).mean() / 255 for i in range(6)]
    np.testing.assert_allclose(column(rows, "scorers:brightness/model"), expected, atol=1 / 255)
    assert [row["prompt"] for row in rows] == ["a dog"] * 2 + ["an owl"] * 2 + ["a fox"] * 2
    assert [row["prompt_id"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert found["num_prompts"] == 3 and found["num_pictures"] == 6 and found["against"] is None
    assert page.count("<img ") == 9 and "Highest" in page and "Lowest" in page  # one of each prompt


def test_a_run_gives_its_prompts_its_reward_and_its_sampler(workdir, small_folder, tmp_path, capsys):
    status, said, found, rows, page = run(
        capsys, tmp_path, model=workdir, against=small_folder, num_steps=4, num_prompts=7
    )
    assert status == 0 and "note: Diversity is not measured" in said.err and "Diversity is not measured" in page
    assert found["prompts"] == "common_animals, held out" and found["num_steps"] == 4
    _, held_out = data.split(data.prompt_source("common_animals"), fraction=0.2, seed=0)
    assert {row["prompt"] for row in rows} <= set(held_out.texts)
    (name,) = found["rewards"]
    a, b = column(rows, f"{name}/model"), column(rows, f"{name}/against")
    one = found["rewards"][name]
    assert name == "scorers:brightness" and not np.array_equal(a, b)
    assert one["difference"]["value"] == pytest.approx((a - b).mean())
    assert one["sigmas"]["value"] == pytest.approx((a - b).mean() / b.std())
    assert one["win_rate"]["value"] == pytest.approx(((a > b) + 0.5 * (a == b)).mean())
    assert f"<h1>bright against {small_folder.name}</h1>" in page and "not picked by hand" in page.lower()
    assert "python -m ddpo_jax.evaluate" in found["command"]


def test_runs_that_sample_differently(workdir, tmp_path, capsys):
    """One way for both, that of --model, and a note; none where a flag says it."""
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sample.num_steps": 2}))
    models = {"model": other / "checkpoints" / "1", "against": workdir, "prompt": "a fox", "num_images": 4}
    parsed = evaluate.parser().parse_args([f"--{k}={v}" for k, v in models.items()] + ["--output=x"])
    configs = [saved.find_checkpoint(models[name]).config for name in ("model", "against")]
    settings = evaluate.sampling.settings_of(parsed, configs)
    (note,) = evaluate.differing(parsed, configs, settings)
    assert settings.num_steps == 2 and note == (
        "The runs sample with different num_steps, 2 and 4; both are drawn with 2."
    )
    _, said, found, _, _ = run(capsys, tmp_path / "out", **models)
    assert "different" not in said.err
    assert found["rewards"]["scorers:brightness"]["win_rate"]["value"] == 0.5  # the same weights


def test_missing_scores_are_left_out_of_both_and_counted(small_folder, other_folder, tmp_path, capsys):
    _, said, found, rows, page = run(
        capsys,
        tmp_path,
        model=small_folder,
        against=other_folder,
        prompts="common_animals",
        num_prompts=8,
        reward="test_evaluate:missing_at_first",
    )
    one = found["rewards"]["test_evaluate:missing_at_first"]
    assert (one["count"], one["missing"]) == (6, 2) and "of 6 pairs, 2 missing" in said.out
    assert [not row["test_evaluate:missing_at_first/model"] for row in rows] == [True, *[False] * 3] * 2
    assert ">missing</th>" in page and "Scores are missing of 4 pictures, such as" in page and "it is the first" in page
    assert "it is the first" in rows[0]["missing_because"] and not rows[1]["missing_because"]


def test_several_pictures_of_a_prompt_tell_of_diversity_within_it(small_folder, other_folder, eye, tmp_path, capsys):
    models = {"model": small_folder, "against": other_folder, "features": eye, "reward": "scorers:brightness"}
    _, said, found, _, page = run(capsys, tmp_path, "--prompt=a", "--prompt=b", num_images=3, **models)
    assert all(found["diversity"][side]["within"]["value"] > 0 for side in ("model", "against"))
    assert "pictures of one prompt" in page and "diversity: " in said.out


def test_a_base_is_for_the_runs_alone(workdir, small_folder):
    flags = evaluate.parser().parse_args(["--model=x", f"--base={small_folder}", "--output=x"])
    sources = [str(workdir), str(small_folder)]
    run_of, folder = (evaluate.load(source, flags, sources) for source in sources)
    assert run_of.config and not folder.config and run_of.model.latent_shape == folder.model.latent_shape


def test_the_page_shows_each_prompt_once():
    assert first_of_each([5, 3, 4, 1], "aabbcc") == [5, 3, 1]


def test_labels_are_short_and_different():
    assert evaluate.labels(["runs/a/checkpoints/10", "tiny"]) == ["a, round 10", "tiny"]
    assert evaluate.labels(["runs/a/export", "org/model"]) == ["a", "model"]
    assert evaluate.labels(["tiny", "tiny"]) == ["tiny (A)", "tiny (B)"]


WRONG = {
    "no prompts": (["--reward=scorers:brightness"], "no prompts: give --prompts=FILE"),
    "no such set": (["--prompts=nowhere", "--reward=scorers:brightness"], "--prompts='nowhere': not a built-in set"),
    "no reward": (["--prompt=a"], "no reward: give --reward=NAME"),
    "a wrong one": (["--prompt=a", "--reward=clip_scor"], "--reward: there is no reward 'clip_scor'"),
    "no CLIP": (["--prompt=a", "--reward=clip_score"], "reward.clip_model=''"),
    "no features": (["--prompt=a", "--reward=scorers:brightness", "--features=/no"], "--features='/no'"),
    "no other": (["--prompt=a", "--against=/nowhere"], "--against='/nowhere': no such folder"),
    "another size": (["--prompt=a", "--against=tiny"], "give --resolution=PIXELS"),
    "no side": (["--prompt=a", "--split=train"], "--split=train: no prompts are held out; give --held_out"),
    "a fraction": (["--prompt=a", "--held_out=1.5"], "--held_out=1.5: expected a fraction"),
    "none left": (["--prompt=a", "--held_out=0.5"], "--held_out=0.5 of 1 prompts leaves a side"),
    "no number": (["--prompt=a", "--num_prompts=0"], "--num_prompts=0: expected 1 or more"),
    "a field": (
        ["--prompt=a", "--reward=clip_score", "--config.reward.clip_modle=tiny"],
        "did you mean --config.reward.clip_model",
    ),
    "a file": (["--prompt=a", f"--output={__file__}"], "cannot be written"),
    "a base for folders": (["--prompt=a", "--base=tiny"], "--base=tiny is for a run's folder"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line_before_anything_is_drawn(small_folder, tmp_path, capsys, arguments, message):
    flags = [f"--model={small_folder}", f"--output={tmp_path / 'out'}", "--compilation_cache=", *arguments]
    status = evaluate.main(flags)
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and message in last, said.err
    assert not (tmp_path / "out").exists() and not re.search("Traceback", said.err)


def test_a_reward_that_raises_stops(small_folder, tmp_path, capsys):
    status, said, found, _, _ = run(
        capsys, tmp_path / "out", "--prompt=a", model=small_folder, reward="scorers:raising"
    )
    assert status == 3 and said.err.splitlines()[-1].startswith("stopped: reward scorers:raising raised OSError")
    assert found is None
