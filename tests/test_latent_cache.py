"""What the VAE makes of pictures, kept: the same numbers as without, no picture decoded twice, no broken record."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from small import write_folder
from small_run import equal, silent, small_config
from test_run import flags, last_checkpoint, rows_without_times

from ddpo_jax import image_text, preferences
from ddpo_jax.build import build
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.latent_cache import FILES, TOLD, open_cache
from ddpo_jax.main import main
from ddpo_jax.models.stable_diffusion import Source, identify_encoder
from ddpo_jax.types import Posterior

SHAPE = (3, 2, 4)
COUNT = 9
RECORD = 8 + 2 * 4 * int(np.prod(SHAPE))
BATCH = 6  # of 9 pairs: passes end inside of rounds
DATA = {"data.batch_size": BATCH, "data.prompt_dropout": 0.3, "train.num_updates": 1}


def opened(folder, *, dtype="float32", **identity):
    return open_cache(str(folder), identity={"vae": "a", **identity}, latent_shape=SHAPE, dtype=dtype)


def posterior_of(numbers, flipped):
    """Numbers that tell the picture."""
    seeds = zip(numbers.tolist(), flipped.astype(int).tolist(), strict=True)
    rows = [np.random.default_rng(seed).normal(size=(2, *SHAPE)) for seed in seeds]
    mean, log_variance = np.moveaxis(np.array(rows, np.float32), 1, 0)
    return Posterior(mean, log_variance)


def written(folder, **settings):
    """A cache of COUNT pictures, each as it is and flipped."""
    cache = opened(folder, **settings)
    numbers, flipped = np.repeat(np.arange(COUNT), 2), np.tile([False, True], COUNT)
    cache.write(numbers, flipped, posterior_of(numbers, flipped))
    return cache


def there(cache, *, flipped=False, count=COUNT):
    """Which of the pictures are; what is there is right."""
    numbers, over = np.arange(count), np.full(count, flipped)
    found, known = cache.read(numbers, over)
    expected = posterior_of(numbers, over)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a[known], b[known])
    return known.tolist()


# Records


def test_records_come_back_and_holes_do_not(tmp_path):
    cache = opened(tmp_path / "cache")
    assert not any(there(cache)) and not (tmp_path / "cache").exists()
    numbers, flipped = np.array([5, 1, 5, 7]), np.array([False, True, True, False])
    cache.write(numbers, flipped, posterior_of(numbers, flipped))
    assert there(cache) == [i in (5, 7) for i in range(COUNT)]
    assert there(opened(tmp_path / "cache"), flipped=True) == [i in (1, 5) for i in range(COUNT)]


@pytest.mark.parametrize("damage", ["cut off", "zeros", "one bit", "another's"])
def test_a_record_that_is_not_whole_counts_as_none(tmp_path, damage):
    cache = written(tmp_path)
    path = tmp_path / FILES[0]
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        del content[-3:]
    elif damage == "zeros":  # of a page that never reached the disk
        content[-RECORD + 20 : -RECORD + 40] = bytes(20)
    elif damage == "one bit":
        content[-1] ^= 1
    else:
        content[-RECORD:] = content[:RECORD]
    path.write_bytes(content)
    assert there(cache) == [True] * (COUNT - 1) + [False]
    last = np.array([COUNT - 1]), np.array([False])
    cache.write(*last, posterior_of(*last))
    assert all(there(cache)) and all(there(cache, flipped=True))


def test_half_precision_is_half_as_long_and_nearly_the_same(tmp_path):
    cache, other = written(tmp_path / "half", dtype="float16"), written(tmp_path / "whole")
    found, known = cache.read(np.arange(COUNT), np.zeros(COUNT, bool))
    exact, _ = other.read(np.arange(COUNT), np.zeros(COUNT, bool))
    assert known.all() and found.mean.dtype == np.float16
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-3)
    sizes = [(tmp_path / name / FILES[0]).stat().st_size - 8 * COUNT for name in ("half", "whole")]
    assert 2 * sizes[0] == sizes[1]


def test_what_it_was_not_made_for_is_refused(tmp_path):
    written(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.cache=.*made with another vae; give another folder"):
        open_cache(str(tmp_path / "cache"), identity={"vae": "b"}, latent_shape=SHAPE, dtype="float32")
    with pytest.raises(UserError, match=r"made with another data\.cache_dtype"):
        opened(tmp_path / "cache", dtype="float16")
    with pytest.raises(UserError, match=r"data\.cache_dtype 'float8'"):
        opened(tmp_path / "cache", dtype="float8")
    (tmp_path / "cache" / TOLD).write_text("{")
    with pytest.raises(UserError, match=r"cache\.json: cannot be read; delete the folder"):
        opened(tmp_path / "cache")
    (tmp_path / "cut off").mkdir()
    (tmp_path / "cut off" / f"{TOLD}.1234").write_text("{")  # of a run that was killed as it began the folder
    written(tmp_path / "cut off")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds something else"):
        opened(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "mine" / "letter.txt" / "cache")


def test_a_folder_that_another_run_takes_meanwhile_stops_the_run(tmp_path):
    ours, theirs = opened(tmp_path / "cache"), opened(tmp_path / "cache", resolution=512)
    picture = np.zeros(1, int), np.zeros(1, bool)
    theirs.write(*picture, posterior_of(*picture))
    with pytest.raises(RunStopped, match="another run has begun to use it"):
        ours.write(*picture, posterior_of(*picture))
    (tmp_path / "file").write_text("")
    blocked = opened(tmp_path / "later" / "cache")
    (tmp_path / "later").write_text("")
    with pytest.raises(RunStopped, match=r"data\.cache=.*cannot be written"):
        blocked.write(*picture, posterior_of(*picture))


WRITER = """
import sys
import numpy as np
sys.path.append(sys.argv[2])
from test_latent_cache import SHAPE, opened, posterior_of
cache = opened(sys.argv[1])
numbers, flipped = np.arange(200), np.zeros(200, bool)
posterior = posterior_of(numbers, flipped)
print("begun", flush=True)
while True:
    order = np.random.permutation(200)
    cache.write(order, flipped, type(posterior)(*(x[order] for x in posterior)))
"""


def test_killed_at_any_moment_no_record_lies(tmp_path):
    """Two processes write one folder."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout.readline() == b"begun\n"
        cache = opened(tmp_path / "cache")
        for _ in range(20):
            there(cache, count=200)  # which checks what it finds
        time.sleep(random.uniform(0, 0.05))
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert sum(there(cache, count=200)) >= 150


# Rounds


def write_pairs(folder, colors=range(COUNT)):
    """Pairs of which either may be preferred, and a tie, as pairs.jsonl; the same pictures as metadata.jsonl."""
    rows, captions = [], []
    for i in colors:
        pixels = np.random.default_rng(i).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
        for side in range(2):
            Image.fromarray(pixels[side]).save(folder / f"{i}-{side}.png")
            captions.append({"file_name": f"{i}-{side}.png", "text": f"picture {i}"})
        row = {"prompt": f"picture {i}", "image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "label": (i % 3) / 2}
        rows.append(row)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pictures"))


def settings_of(algorithm, pictures, **changes):
    flips = {"data.horizontal_flip": True} if algorithm == "diffusion_dpo" else {}
    return {**DATA, "algorithm": algorithm, "data.source": str(pictures), **flips, **changes}


def collected(run, epoch, inputs=None):
    key = jax.random.key(epoch)
    return run.algorithm.collect(None, run.frozen, run.draw(epoch) if inputs is None else inputs, (), key)[0]


def refuse(*arguments):
    raise AssertionError("a picture was decoded")


@pytest.mark.parametrize("algorithm", ["diffusion_dpo", "sft"])
def test_rounds_are_the_same_and_decode_nothing_twice(small_folder, pictures, tmp_path, monkeypatch, algorithm):
    cache = {"data.cache": str(tmp_path / "cache")}
    plain, kept = (
        build(small_config(small_folder, **settings_of(algorithm, pictures, **changes)), silent)
        for changes in ({}, cache)
    )
    assert not (tmp_path / "cache").exists()  # nothing is written before the first round
    expected = [collected(plain, epoch) for epoch in range(4)]
    missing = []
    for epoch in range(4):
        inputs = kept.draw(epoch)
        missing.append(len(inputs[0].missing))
        assert equal(collected(kept, epoch, inputs), expected[epoch])
    assert missing[0] == BATCH * (2 if algorithm == "diffusion_dpo" else 1) and sum(missing) <= 3 * missing[0]
    for module in (image_text, preferences):
        monkeypatch.setattr(module, "load_image", refuse)
    for epoch in (3, 0):  # with what is there no picture is opened
        inputs = kept.draw(epoch)
        assert not len(inputs[0].missing)
        assert equal(collected(kept, epoch, inputs), expected[epoch])
    assert not equal(expected[0].x_0, expected[3].x_0)
    # what one process alone lacks, all decode
    with pytest.raises(AssertionError, match="a picture was decoded"):
        inputs[0].images(np.array([0]))


def test_latents_and_dropped_captions_are_drawn_anew(small_folder, pictures, tmp_path):
    changes = {"data.cache": str(tmp_path / "cache"), "data.cache_dtype": "float16", "data.batch_size": COUNT}
    run = build(small_config(small_folder, **settings_of("diffusion_dpo", pictures, **changes)), silent)
    first, second = (collected(run, 0) for _ in range(2))  # encoded, and recalled
    assert equal(first, second)
    inputs = run.draw(0)
    key = jax.random.key(1)
    other = run.algorithm.collect(None, run.frozen, inputs, (), key)[0]
    assert not np.isclose(other.x_0, first.x_0).any(axis=(1, 2, 3, 4)).all()
    empty = np.asarray(run.frozen.uncond.context)[0]
    dropped = [[np.array_equal(row, empty) for row in np.asarray(batch.cond.context)] for batch in (first, other)]
    assert dropped[0] != dropped[1] and any(dropped[0])


@pytest.mark.slow
def test_a_whole_run_in_two_parts_is_the_same(small_folder, pictures, tmp_path):
    settings = settings_of("diffusion_dpo", pictures, **{"eval_every": 0, "eval_prompts": 2, "mesh.data": 1})
    assert main(flags(small_folder, tmp_path / "plain", num_epochs=5, **settings)) == 0
    for num_epochs in (2, 5):
        kept = {"num_epochs": num_epochs, "data.cache": tmp_path / "cache"}
        assert main(flags(small_folder, tmp_path / "kept", **settings, **kept)) == 0
    assert rows_without_times(tmp_path / "plain") == rows_without_times(tmp_path / "kept")
    (step, state), (expected_step, expected) = (last_checkpoint(tmp_path / name) for name in ("kept", "plain"))
    assert step == expected_step == 5 and equal(state, expected)


def test_a_source_that_is_another_is_known(small_folder, pictures, tmp_path):
    source = preferences.open_source(str(pictures), resolution=16)
    (tmp_path / "copy").mkdir()
    copy = preferences.open_source(str(write_pairs(tmp_path / "copy")), resolution=16)
    assert copy.identity() == source.identity()
    assert [copy.told(i) for i in range(COUNT)] == [(f"picture {i}", (i % 3) / 2) for i in range(COUNT)]
    for name, colors in (("other", [*range(COUNT - 1), 77]), ("order", range(COUNT)[::-1]), ("fewer", range(5))):
        (tmp_path / name).mkdir()
        other = preferences.open_source(str(write_pairs(tmp_path / name, colors)), resolution=16)
        assert other.identity() != source.identity()
    Image.new("L", (600, 100)).save(tmp_path / "picture.bmp")
    Image.new("L", (600, 100)).save(tmp_path / "picture.jpg", exif=Image.Exif())
    before = [image_text.identify([tmp_path / name]) for name in ("picture.bmp", "picture.jpg")]
    middle = np.zeros((100, 600), np.uint8)
    middle[50, 300] = 1
    Image.fromarray(middle).save(tmp_path / "picture.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation
    Image.new("L", (600, 100)).save(tmp_path / "picture.jpg", exif=turned)
    turned[0x0112] = 1
    Image.new("L", (600, 100)).save(tmp_path / "straight.jpg", exif=turned)
    after = [image_text.identify([tmp_path / name]) for name in ("picture.bmp", "picture.jpg", "straight.jpg")]
    assert len({*before, *after}) == 5
    captioned = image_text.open_source(str(pictures), resolution=16)
    assert captioned.caption(2) == "picture 1"
    with pytest.raises(UserError, match=r"0-0\.png: cannot be read"):
        (tmp_path / "copy" / "0-0.png").unlink()
        copy.identity()


def test_an_encoder_that_is_another_is_known(small_folder, tmp_path):
    found = identify_encoder(Source(small_folder, ""), np.float32)
    assert found == identify_encoder(Source(write_folder(tmp_path / "same"), ""), np.float32)
    other = identify_encoder(Source(write_folder(tmp_path / "other", seed=5), ""), np.float32)
    assert {name for name in found if found[name] != other[name]} == {"vae"}
    half = identify_encoder(Source(small_folder, ""), jax.numpy.bfloat16)
    assert {name for name in found if found[name] != half[name]} == {"compute_dtype"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sft", "data.source": "scorers:colored"}, r"scorers:colored' gives new pictures in every round"),
        ({"algorithm": "ddpo_is"}, r"data\.cache='.*': ddpo_is learns from no data set"),
        ({"algorithm": "sft", "data.cache_dtype": "int8"}, r"data\.cache_dtype 'int8'"),
    ],
)
def test_wrong_settings_are_refused(small_folder, pictures, tmp_path, changes, message):
    changes = {**DATA, "data.source": str(pictures), "data.cache": str(tmp_path / "cache"), **changes}
    with pytest.raises(UserError, match=message):
        build(small_config(small_folder, **changes), silent)
    assert not (tmp_path / "cache").exists()
