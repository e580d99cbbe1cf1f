"""Scoring a folder: the same scores as the reward called directly, whatever the pictures' sizes, kinds and defects."""

import csv
import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpo_jax import rewards, score, scoring
from ddpo_jax.picture_folder import read_picture
from ddpo_jax.tiny.render import render
from ddpo_jax.types import Prompts

BASE = Path(__file__).parents[1] / "configs" / "base.py"
CLIP = "--config.reward.clip_model=tiny"
SIZES = ((64, 64), (33, 50), (71, 40))  # width, height
SETTINGS = rewards.Settings(deadline=20.0, num_workers=1, clip_model="tiny")


def write_pictures(folder, count=11, **more):
    """Rendered pictures of mixed sizes with their captions; the pixels."""
    folder.mkdir()
    rows = []
    for i in range(count):
        pixels, text = render(10**8 + i)
        Image.fromarray(pixels).resize(SIZES[i % len(SIZES)]).save(folder / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": text, **more})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [np.asarray(Image.open(folder / row["file_name"])) for row in rows], [row["text"] for row in rows]


def run(capsys, tmp_path, *arguments, images="pictures"):
    """The exit status, what was said, and the rows of scores.csv."""
    output = tmp_path / "out"
    status = score.main(
        [f"--images={tmp_path / images}", f"--output={output}", "--compilation_cache=", "--chunk_size=3", *arguments]
    )
    path = output / "scores.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []
    return status, capsys.readouterr(), rows


def column(rows, name):
    return [float(row[name]) if row[name] else np.nan for row in rows]


def read_bright(images, prompts, metadata):
    """A picture's brightness, where its metadata asks for it."""
    return [image.mean() if told["wanted"] else np.nan for image, told in zip(images, metadata, strict=True)]


def test_mixed_sizes_score_as_the_reward_itself_does(tmp_path, capsys):
    images, texts = write_pictures(tmp_path / "pictures")
    status, said, rows = run(capsys, tmp_path, "--reward=clip_score,scorers:brightness", CLIP)
    assert status == 0 and not said.err
    assert [row["file_name"] for row in rows] == [f"{i:02d}.png" for i in range(11)]
    assert [row["prompt"] for row in rows] == texts
    reward, params = rewards.make("clip_score", SETTINGS)
    expected = np.full(len(images), np.nan)
    for k in range(len(SIZES)):
        same, own = np.stack(images[k :: len(SIZES)]), tuple(texts[k :: len(SIZES)])
        prompts = Prompts(own, np.zeros((len(own), 0), np.int32), np.arange(len(own)), ({},) * len(own))
        expected[k :: len(SIZES)] = reward.result(reward.submit(params, same, prompts))[:, 0]
    np.testing.assert_allclose(column(rows, "clip_score"), expected, atol=1e-3)
    np.testing.assert_allclose(column(rows, "scorers:brightness"), [image.mean() / 255 for image in images], rtol=1e-5)
    assert re.search(r"^clip_score: .* of 11 pictures$", said.out, re.MULTILINE) and "a second" in said.out
    page = (tmp_path / "out" / "scores.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 11 and page.count('src="data:image/') == 11 and "http" not in page
    best = rows[int(np.argmax(expected))]
    first = re.search(r"<figure><img.*?</figure>", page, re.DOTALL)[0]
    assert f"<q>{best['prompt']}</q>" in first and best["file_name"].removesuffix(".png") in first
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.csv", "scores.html"}


def test_a_broken_picture_is_told_and_the_others_scored(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 3)
    whole = (tmp_path / "pictures" / "00.png").read_bytes()
    (tmp_path / "pictures" / "01.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pictures" / "02.webp").write_text("no picture")
    (tmp_path / "pictures" / "grid.png").write_bytes(whole)  # as ddpo_jax.sample leaves it there
    status, said, rows = run(capsys, tmp_path, "--reward=scorers:brightness", "--prompt=<b>")
    assert status == 0 and "note: 01.png: cannot be read" in said.err and "note: 02.webp: not a picture" in said.err
    assert [row["file_name"] for row in rows] == ["00.png", "01.png", "02.png", "02.webp"]
    assert [bool(row["scorers:brightness"]) for row in rows] == [True, False, True, False]
    assert [bool(row["missing_because"]) for row in rows] == [False, True, False, True]
    assert {row["prompt"] for row in rows} == {"<b>"}
    page = (tmp_path / "out" / "scores.html").read_text(encoding="utf-8")
    assert (
        "Missing scores" in page
        and "cannot be read" in page
        and "&lt;b&gt;" in page
        and "<b>" not in page.split("<q>")[1][:9]
    )


def test_a_host_function_reads_the_metadata(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 4, wanted=True)
    path = tmp_path / "pictures" / "metadata.jsonl"
    path.write_text(path.read_text().replace("true", "false", 1) + '{"file_name": "gone.png", "text": "a fox"}\n')
    status, said, rows = run(capsys, tmp_path, "--reward=metadata:test_score:read_bright,jpeg_compressibility")
    assert status == 0 and "1 files that metadata.jsonl names are not there, such as 'gone.png'" in said.err
    assert np.isnan(column(rows, "metadata:test_score:read_bright")).tolist() == [True, False, False, False]
    assert np.isfinite(column(rows, "jpeg_compressibility")).all()
    assert "1 missing" in said.out


def test_alpha_is_over_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (read_picture(tmp_path / "palette.png") == 255).all()
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.bmp")
    assert (read_picture(tmp_path / "grey.bmp") == 77).all() and read_picture(tmp_path / "grey.bmp").shape == (4, 4, 3)
    Image.fromarray(np.full((4, 4), 256 * 90, np.uint16)).save(tmp_path / "deep.png")
    assert (read_picture(tmp_path / "deep.png") == 90).all()
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, :5] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    for kind in ("tiff", "png", "webp"):
        Image.fromarray(pixels).save(
            tmp_path / f"turned.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {})
        )
        np.testing.assert_array_equal(read_picture(tmp_path / f"turned.{kind}"), np.rot90(pixels, -1))


def test_a_page_of_very_many_shows_the_first_and_the_last(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score.report, "MAX_BEST", 3)
    monkeypatch.setattr(score.report, "MAX_WORST", 2)
    write_pictures(tmp_path / "pictures", 9)
    assert run(capsys, tmp_path, "--reward=scorers:brightness")[0] == 0
    page = (tmp_path / "out" / "scores.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 5 and "4 of 9 pictures" in page
    assert re.findall(r"<i>(\d+)</i>", page) == ["1", "2", "3", "8", "9"]


def test_settings_are_those_of_a_run():
    base = runpy.run_path(str(BASE))
    fields = base["get_config"]().reward
    assert {name: fields[name] for name in rewards.Settings._fields} == scoring.DEFAULTS._asdict()
    given = [
        "--config.reward.num_workers=3",
        "--config.reward.clip_template=a photo of {}=",
        "-config.reward.deadline=2",
    ]
    assert scoring.read_settings(given) == rewards.Settings(2.0, 3, "", "a photo of {}=")


WRONG = {
    "no folder": (["--reward=scorers:brightness", "--images=nowhere"], "--images=nowhere: no such folder"),
    "no picture": (["--reward=scorers:brightness", f"--images={BASE.parent}"], "no picture in it"),
    "no reward": (["--reward=clip_scor"], "--reward: there is no reward 'clip_scor'. Did you mean clip_score"),
    "twice": (["--reward=scorers:brightness,scorers:brightness"], "--reward must give"),
    "no knob": (["--reward=clip_score", "--config.reward.clip_modle=tiny"], "did you mean --config.reward.clip_model"),
    "of a run": (["--reward=clip_score", "--config.train.learning_rate=1"], "no field that a score depends on"),
    "the name": (["--reward=clip_score", "--config.reward.name=clip_score"], "give --reward in place"),
    "no number": (["--reward=clip_score", "--config.reward.num_workers=x"], "expected a whole number"),
    "no value": (["--reward=clip_score", "--config.reward.clip_model"], "expected =VALUE"),
    "no CLIP": (["--reward=clip_score"], "reward.clip_model=''"),
    "chunks": (["--reward=scorers:brightness", "--chunk_size=0"], "--chunk_size=0: expected 1 or more"),
    "a file": (["--reward=scorers:brightness", f"--output={BASE}"], "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    write_pictures(tmp_path / "pictures", 1)
    status, said, rows = run(capsys, tmp_path, *arguments)
    last = said.err.splitlines()[-1]
    assert status == 2 and not rows and last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists()


def test_the_pictures_folder_is_not_written_to(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 1)
    status, said, _ = run(capsys, tmp_path, "--reward=scorers:brightness", f"--output={tmp_path / 'pictures' / '.'}")
    assert status == 2 and "the pictures are in it" in said.err
    assert not list((tmp_path / "pictures").glob("scores.*"))


def test_a_reward_that_raises_stops(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 1)
    status, said, _ = run(capsys, tmp_path, "--reward=scorers:raising")
    assert status == 3 and said.err.startswith("stopped: reward scorers:raising raised OSError")


@pytest.mark.parametrize("line", ["{", '{"text": "a fox"}', '{"file_name": "a.png", "text": 3}', "[]"])
def test_a_bad_line_of_metadata_is_named(tmp_path, capsys, line):
    write_pictures(tmp_path / "pictures", 1)
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n" + line)
    status, said, _ = run(capsys, tmp_path, "--reward=scorers:brightness")
    assert status == 2 and "metadata.jsonl, line 2: expected" in said.err
