"""The embedded model and what makes it: renderings, the judge, samples, the card."""

import itertools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.folder import WEIGHTS, write_json
from ddpo_jax.models.locate import TINY
from ddpo_jax.tiny import card, judge, pictures, publish, samples, vae
from ddpo_jax.tiny.fit import rendered
from ddpo_jax.tiny.render import ANIMALS, PROMPTS, animal_of, portrait, render

FRESH_INDEX = 9_200_000_000  # of renderings that no stage has seen

# Renderings


def test_a_rendering_is_a_function_of_its_index():
    picture, caption = render(FRESH_INDEX)
    again, same = render(FRESH_INDEX)
    assert (picture.shape, picture.dtype, caption) == ((64, 64, 3), np.uint8, same)
    np.testing.assert_array_equal(picture, again)
    assert (render(FRESH_INDEX + 1)[0] != picture).any()


def test_renderings_show_every_animal_and_name_it():
    captions = rendered(FRESH_INDEX, 1024)[1]
    counts = np.bincount(judge.labels(captions), minlength=len(ANIMALS))
    assert (counts > 0).all() and counts.max() < 3 * counts.mean()
    assert 0.4 < np.mean([caption in PROMPTS for caption in captions]) < 0.6


@pytest.mark.parametrize(
    ("caption", "animal"),
    [
        ("a fox", "fox"),
        ("an ant on a red background", "ant"),
        ("a rat on an orange dotted background", "rat"),
        ("ant", "ant"),
        ("fox in the wild", "fox"),
    ],
)
def test_animal_of_a_caption(caption, animal):
    assert ANIMALS[animal_of(caption)] == animal


@pytest.mark.parametrize("caption", ["a unicorn", "a fox riding a bike", "foxes", "", "a bigfox"])
def test_no_animal(caption):
    assert animal_of(caption) is None


def test_portraits_keep_an_animal_in_its_place():
    """By how far the masks of pictures of one animal overlap: nearly, or in part where places and flips differ."""
    assert portrait(FRESH_INDEX)[1] == render(FRESH_INDEX)[1]
    assert _mean_overlap(portrait) > 0.75 > 0.6 > _mean_overlap(render)


def _mean_overlap(draw):
    drawn = [draw(FRESH_INDEX + i) for i in range(600)]
    masks = {}
    for picture, caption in drawn:
        if not re.search(r" on an? \w+ background$", caption):
            continue  # not plain, or not told
        mask = np.abs(picture.astype(int) - picture[0, 0]).sum(axis=-1) > 30
        masks.setdefault(caption.partition(" on ")[0], []).append(mask)
    pairs = [(a, b) for same in masks.values() for a, b in itertools.combinations(same, 2)]
    assert len(pairs) > 20
    return np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])


def test_each_stage_draws_pictures_of_its_own():
    from ddpo_jax.tiny import clip

    first = [0, clip.FIRST_INDEX, vae.FIRST_INDEX, vae.DECODER_FIRST_INDEX, judge.FIRST_INDEX]
    first += [vae.HELD_OUT_INDEX, judge.HELD_OUT_INDEX]
    assert np.diff(first).min() >= 100_000_000  # more than any stage draws


# The judge


def test_the_shipped_judge_knows_fresh_renderings():
    assert judge.share_right(judge.load(), *rendered(FRESH_INDEX, 512)) >= 0.95


def test_the_shipped_judge_is_small():
    path = judge.JUDGE / judge.WEIGHTS
    assert path.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {np.dtype(np.float16)}
    assert json.loads((judge.JUDGE / "config.json").read_text())["animals"] == list(ANIMALS)


def test_judge_training_writes_what_load_opens_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "HELD_OUT", 45)
    first = judge.train(tmp_path / "run", tmp_path / "judge", num_steps=2)
    weights = load_file(tmp_path / "judge" / judge.WEIGHTS)
    assert first == judge.share_right(judge.load(tmp_path / "judge"), *rendered(judge.HELD_OUT_INDEX, 45))
    monkeypatch.setattr(judge, "labels", lambda captions: np.zeros(len(captions), np.int32))  # nothing is left to learn
    judge.train(tmp_path / "run", tmp_path / "again", num_steps=2)
    again = load_file(tmp_path / "again" / judge.WEIGHTS)
    assert all((again[name] == weights[name]).all() for name in weights)


def test_the_judge_is_a_reward():
    pictures, captions = rendered(FRESH_INDEX, 64)
    others = [*captions[1:], captions[0]]
    assert judge.recognised(pictures, captions).mean() >= 0.95
    assert judge.recognised(pictures, others).mean() <= 0.2
    assert np.isnan(judge.recognised(pictures[:1], ("a unicorn",))).all()


# The VAE


def test_the_decoder_trains_on_and_the_encoder_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "HELD_OUT", 8)
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    (path,) = (tmp_path / "vae").glob("*.safetensors")
    before = load_file(path)
    figures = vae.train_decoder(tmp_path / "run", tmp_path, num_steps=2)
    after = load_file(path)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and {name.partition(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}
    assert figures["psnr"] > 20 and 0.5 < figures["latent_std"] < 2


# Samples


def test_the_embedded_model_draws_animals():
    drawn = samples.draw("tiny", num_samples=1, num_steps=10)
    assert drawn.shape == (45, 1, 64, 64, 3)
    assert samples.verdict(samples.recognise_all(judge.load(), drawn)).share >= 0.8


def test_each_sample_has_its_own_noise_whatever_their_number(small_folder):
    drawn = samples.draw(str(small_folder), prompts=PROMPTS[:2], num_samples=3, num_steps=2)
    assert len(np.unique(drawn.reshape(6, -1), axis=0)) == 6
    fewer = samples.draw(str(small_folder), prompts=PROMPTS[:2], num_samples=1, num_steps=2)
    np.testing.assert_array_equal(fewer, drawn[:, :1])


def test_recognise_all_keeps_rows_together():
    images = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1, 1).repeat(3, axis=-1)
    found = samples.recognise_all(lambda images: images[:, 0, 0, 0].astype(int), images)
    np.testing.assert_array_equal(found, [[0, 1, 2], [3, 4, 5]])


def test_verdict():
    """Two samples each: all cats are taken for dogs, one dog for a fox, and the rest is right."""
    cat, dog, fox = (ANIMALS.index(name) for name in ("cat", "dog", "fox"))
    found = np.arange(45)[:, None].repeat(2, axis=1)
    found[cat], found[dog, 1] = dog, fox
    result = samples.verdict(found)
    assert result.share == pytest.approx(87 / 90)
    assert result.num_recognised == 44
    assert (result.right[cat], result.right[dog], result.right[fox]) == (0, 1, 2)
    assert result.confusions == (("cat", "dog", 2), ("dog", "fox", 1))


def test_the_vae_reconstructs():
    images = rendered(FRESH_INDEX, 16)[0]
    out = samples.reconstruct("tiny", images)
    assert out.shape == images.shape
    assert np.mean((out - images) ** 2) < 0.1 * np.var(images)


@pytest.mark.slow
def test_the_judge_knows_what_the_embedded_model_draws():
    result = samples.verdict(samples.recognise_all(judge.load(), samples.draw("tiny")))
    assert result.share >= 0.7


# What is published


@pytest.fixture(scope="module")
def published(small_folder, tmp_path_factory):
    """A folder published from a workdir whose stages never were."""
    workdir, target = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("assets") / "tiny-sd"
    shutil.copytree(small_folder, workdir / "portraits" / "export")
    shutil.copytree(small_folder / "vae", workdir / "model" / "vae")
    (workdir / "portraits" / "export" / "vae" / WEIGHTS["vae"]).write_bytes(b"of a decoder that was trained on since")
    write_json(workdir / "portraits" / "config.json", {"data.batch_size": 1024, "train.num_updates": 64})
    shutil.copytree(small_folder / "text_encoder", workdir / "tiny-clip")
    # The CLIP was killed after step 100, and went on from step 50.
    clip = [{"step": step, "loss": 1 / step, "accuracy": 0.5, "seconds": 600.0} for step in (50, 100, 100, 150)]
    unet = [{"epoch": i, "loss": 0.1, "seconds/data": 1.0, "seconds/update": 59.0} for i in range(43)]
    vae_rows = [{"step": 50, "psnr": 20.0, "seconds": 45.0}]
    decoder = [{"step": 50, "psnr": 20.0, "seconds": 120.0}]
    stages = {"clip": clip, "vae": vae_rows, "decoder": decoder, "unet": unet, "portraits": unet[:21]}
    for stage, rows in stages.items():
        path = workdir / stage / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    publish.copy_parts(workdir, target)
    originals = np.full((publish.SHOWN, 64, 64, 3), 0.5, np.float32)
    found = np.arange(45)[:, None].repeat(4, axis=1)
    found[ANIMALS.index("mouse"), :3] = ANIMALS.index("rat")
    measured = publish.Measured(
        originals, originals + 0.05, 0.987, 0.912, np.zeros((45, 4, 64, 64, 3), np.float32), found
    )
    publish.write_card(workdir, target, measured, hardware="an abacus", named=44)
    return target


def test_published_weights_are_half_precision_and_load(published, small_folder):
    for path in published.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {np.dtype(np.float16)}, path
    denoiser = stable_diffusion.load(str(published), dtype=jnp.float32)[1].denoiser
    exact = stable_diffusion.load(str(small_folder), dtype=jnp.float32)[1].denoiser
    np.testing.assert_array_equal(denoiser["conv_in"]["bias"], exact["conv_in"]["bias"].astype(np.float16))


def test_published_clip_carries_its_tokenizer(published):
    for path in (published / "tokenizer").iterdir():
        assert (published.parent / "tiny-clip" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "figure",
    [
        "98.3%",  # of the samples: 177 of 180
        "44\nof the 45 animals",
        "| mouse 1 |",
        "mouse for rat (3)",
        "98.7%",
        "91.2%",
        "26.0 dB",  # 10 lg (1 / 0.05²)
        "| CLIP | 150 steps of 128 pictures | 40 min |",
        "| VAE | 50 steps of 8 pictures | 1 min |",
        "| VAE's decoder alone | 50 steps of 8 pictures | 2 min |",
        "--vae-steps=50\n",
        "--decoder-steps=50\n",
        "| UNet | 43 rounds of 1024 pictures, 64 updates each | 43 min |",
        "| UNet, on portraits | 21 rounds of the same | 21 min |",
        "4-fold, 4 channels",
        "named 44.",
        "an abacus",
    ],
)
def test_card_tells(published, figure):
    assert figure in (published / "README.md").read_text(encoding="utf-8")


def test_card_shows_its_pictures(published):
    text = (published / "README.md").read_text(encoding="utf-8")
    shown = [*published.glob("*.png"), *published.glob("*.jpg")]
    for path in shown:
        assert f"({path.name})" in text
        Image.open(path).load()
    assert text.count("](") == len(shown) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 min"), (89.0, "1 min"), (3600.0, "1 h 0 min"), (14525.0, "4 h 2 min")]
)
def test_duration(seconds, text):
    assert card.duration(seconds) == text


def test_sheet_enlarges_and_lays_out_by_rows():
    shown = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    sheet = np.asarray(pictures.sheet(shown / np.float32(255), columns=2))
    step, margin = pictures.FACTOR, pictures.MARGIN
    for picture, (row, column) in zip(shown, ((0, 0), (0, 1), (1, 0)), strict=True):
        top, left = margin + row * (4 * step + margin), margin + column * (5 * step + margin)
        np.testing.assert_array_equal(sheet[top : top + 4 * step : step, left : left + 5 * step : step], picture)
    assert sheet.shape == (2 * 4 * step + 3 * margin, 2 * 5 * step + 3 * margin, 3)


def test_what_ships_is_small():
    folders = (TINY, TINY.parent / "tiny-clip")
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")) < 16_000_000
    assert sum(path.stat().st_size for path in TINY.glob("*.[jp][pn]g")) < 400_000
