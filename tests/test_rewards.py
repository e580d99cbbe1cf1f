"""Rewards: twins on host and device, missing pictures, deadlines, and failures that name the reward."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpo_jax import rewards
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.rewards import jpeg
from ddpo_jax.types import Prompts


def make_prompts(b):
    return Prompts(
        texts=tuple(f"prompt {i}" for i in range(b)),
        tokens=np.arange(b * 4).reshape(b, 4),
        id=np.arange(b),
        metadata=tuple({"answer": i} for i in range(b)),
    )


def make_images(b, seed=0):
    return np.random.default_rng(seed).random((b, 8, 6, 3), dtype=np.float32)


def host(fn, name="mine", deadline=20.0, num_workers=1, **prepare):
    return rewards.on_host(name, fn, deadline=deadline, num_workers=num_workers, **prepare)


def scored(reward, images, params=()):
    return reward.result(reward.submit(params, images, make_prompts(len(images))))


def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))


def first_tokens(prompts):
    return prompts.tokens[:, 0]


KINDS = {
    "host": host(lambda images, tokens: 2 * images.mean(axis=(1, 2, 3)) + tokens, prepare=first_tokens),
    "device": rewards.on_device(
        "mine", lambda scale, images, tokens: scale * images.mean(axis=(1, 2, 3)) + tokens, first_tokens
    ),
}


def test_host_equals_device_twin_also_when_pictures_are_missing():
    images = make_images(5)
    images[1, 0, 0, 0], images[3, 2, 2, 2] = np.nan, np.inf
    on_host, on_device = (scored(KINDS[kind], jnp.asarray(images), 2.0) for kind in ("host", "device"))
    assert on_host.shape == on_device.shape == (5, 1)
    assert on_host.dtype == on_device.dtype == np.float32
    np.testing.assert_allclose(on_host, on_device, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(on_host[:, 0]), [False, True, False, True, False])


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_picture_does_not_touch_the_others(kind):
    images = make_images(4)
    whole = scored(KINDS[kind], jnp.asarray(images), 2.0)
    images[2] = np.nan
    holed = scored(KINDS[kind], jnp.asarray(images), 2.0)
    assert np.isnan(holed[2])
    np.testing.assert_array_equal(np.delete(holed, 2, 0), np.delete(whole, 2, 0))


def test_scorer_never_sees_a_missing_picture_and_keeps_prompts_in_step():
    calls = []

    def watch(images, prompts):
        calls.append((images, prompts))
        images += 1  # a scorer may write to its copy
        return [1, 2]

    images = make_images(3)
    images[1, 4, 4] = np.nan
    scores = scored(host(watch), jnp.asarray(images))
    np.testing.assert_array_equal(scores, [[1], [np.nan], [2]])
    ((shown, texts),) = calls
    assert np.isfinite(shown).all() and texts == ("prompt 0", "prompt 2")

    assert np.isnan(scored(host(watch), jnp.full((2, 8, 6, 3), jnp.nan))).all()
    assert len(calls) == 1


def test_prepare_sees_the_metadata_of_the_pictures_shown():
    images = make_images(3)
    images[0] = np.inf
    scores = scored(host(lambda images, prompts: [m["answer"] for m in prompts.metadata], prepare=lambda p: p), images)
    np.testing.assert_array_equal(scores, [[np.nan], [1], [2]])


def test_device_scorer_never_sees_a_missing_picture():
    # Every picture's score reads the whole batch: one NaN picture would poison all.
    reward = rewards.on_device("mine", lambda p, images, i: jnp.full(len(images), images.sum()), lambda prompts: ())
    images = make_images(3)
    images[1] = np.nan
    np.testing.assert_allclose(scored(reward, images)[[0, 2], 0], images[[0, 2]].sum(), rtol=1e-5)


def test_scores_that_are_not_finite_are_missing():
    values = [1.0, np.inf, -np.inf, np.nan, 1e300]
    expected = np.array([[1], [np.nan], [np.nan], [np.nan], [np.nan]])
    np.testing.assert_array_equal(scored(host(lambda images, prompts: values), make_images(5)), expected)
    reward = rewards.on_device("mine", lambda p, images, i: jnp.array(values[:4]), lambda prompts: ())
    np.testing.assert_array_equal(scored(reward, make_images(4)), expected[:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [lambda x: 2 * x - 1, lambda x: 255 * x])
def test_pixels_outside_0_1_are_refused(kind, wrong):
    with pytest.raises(UserError, match=r"reward mine .*pixels are float in \[0, 1\]"):
        scored(KINDS[kind], jnp.asarray(wrong(make_images(2))), 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_and_floats_of_a_picture_score_alike(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    found, expected = (scored(KINDS[kind], jnp.asarray(x), 2.0) for x in (pixels, pixels / np.float32(255)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"int32 pixels: expected float in \[0, 1\], or uint8"):
        scored(KINDS[kind], jnp.asarray(pixels, jnp.int32), 2.0)


def test_a_scorer_says_why_scores_are_missing():
    def fussy(images, prompts):
        return rewards.Scores([1.0, np.nan], "the reply was 'dunno'")

    joint = rewards.join([host(brightness, name="bright"), host(fussy, name="fussy"), KINDS["device"]])
    pending = joint.submit(((), (), 2.0), make_images(2), make_prompts(2))
    np.testing.assert_array_equal(np.isnan(joint.result(pending)), [[False, False, False], [False, True, False]])
    assert joint.why(pending) == "fussy: the reply was 'dunno'"


def test_the_probe_stops_at_a_scorer_that_gives_nothing_and_says_why():
    def absent(images, prompts):
        return rewards.Scores(np.full(len(images), np.nan), "no server at port 8000")

    with pytest.raises(RunStopped, match=r"gave no score for two grey pictures.*absent: no server at port 8000"):
        rewards.probe(rewards.join([host(absent, name="absent")]), ((),), make_prompts(2), resolution=8)
    rewards.probe(rewards.join([host(lambda images, prompts: [np.nan, 1])]), ((),), make_prompts(2), resolution=8)
    watched = rewards.join([host(absent, name="absent"), host(brightness, name="bright")])
    rewards.probe(watched, ((), ()), make_prompts(2), resolution=8, combine=lambda scores: scores[:, 1])


@pytest.mark.parametrize(
    "returned", [1.0, None, [1.0], [[1.0], [2.0]], ["a", "b"], [1.0, None], {"score": 1}], ids=lambda v: str(v)
)
def test_wrong_scores_are_refused_with_what_was_expected(returned):
    with pytest.raises(UserError, match=r"reward mine must return shape \(2,\).*not shape"):
        scored(host(lambda images, prompts: returned), make_images(2))


@pytest.mark.parametrize(("fn", "shape"), [(lambda x: x.mean(axis=(2, 3)), r"\(2, 8\)"), (lambda x: 1.0, r"\(\)")])
def test_wrong_shape_on_device_is_refused(fn, shape):
    reward = rewards.on_device("mine", lambda params, images, inputs: fn(images), lambda prompts: ())
    with pytest.raises(UserError, match=rf"reward mine must return shape \(2,\).*not {shape}"):
        scored(reward, make_images(2))


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), TimeoutError("no server"), SystemExit(3)])
def test_what_a_scorer_raises_stops_the_run_by_name(error):
    def fail(images, prompts):
        raise error

    with pytest.raises(RunStopped, match=f"reward mine raised {type(error).__name__}: {error}") as stopped:
        scored(host(fail), make_images(2))
    assert stopped.value.__cause__ is error


def test_submit_does_not_wait_and_batches_are_scored_in_order():
    gate, order = threading.Event(), []

    def wait(images, prompts):
        assert gate.wait(20)
        order.append(float(images[0, 0, 0, 0]))
        return np.full(len(images), images[0, 0, 0, 0])

    reward = host(wait)
    pending = [reward.submit((), jnp.full((2, 8, 6, 3), i / 8), make_prompts(2)) for i in range(8)]
    assert order == []
    gate.set()
    np.testing.assert_array_equal([reward.result(p)[0, 0] for p in pending], np.arange(8) / 8)
    assert order == [i / 8 for i in range(8)]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_num_workers_run_at_once_and_no_more(num_workers):
    lock, running, most = threading.Lock(), [0], [0]
    together = threading.Barrier(num_workers)

    def count(images, prompts):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(20)
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return np.zeros(len(images))

    reward = host(count, num_workers=num_workers)
    for pending in [reward.submit((), make_images(1), make_prompts(1)) for _ in range(9)]:
        reward.result(pending)
    assert most[0] == num_workers


def test_a_hanging_scorer_stops_the_run_in_time():
    gate = threading.Event()
    reward = host(lambda images, prompts: gate.wait(60), deadline=0.2)
    pending = [reward.submit((), make_images(1), make_prompts(1)) for _ in range(3)]
    begun = time.monotonic()
    with pytest.raises(RunStopped, match=r"reward mine .*0\.2 s.*reward\.deadline"):
        reward.result(pending[0])
    assert time.monotonic() - begun < 15
    gate.set()


def test_the_deadline_does_not_count_the_rollout(monkeypatch):
    rolled_out = threading.Event()

    def wait_for_device(images):
        time.sleep(0.6)
        rolled_out.set()

    def score(images, prompts):
        rolled_out.wait(20)  # stands in for the copy, which waits for the device as well
        return brightness(images, prompts)

    # The CPU device computes while it dispatches, so it is never late itself.
    monkeypatch.setattr(jax, "block_until_ready", wait_for_device)
    assert scored(host(score, deadline=0.3), make_images(2)).shape == (2, 1)


def test_the_deadline_is_for_each_batch_and_not_for_the_queue():
    def slow(images, prompts):
        time.sleep(0.3)
        return np.zeros(len(images))

    reward = host(slow, deadline=0.9)
    for pending in [reward.submit((), make_images(1), make_prompts(1)) for _ in range(5)]:  # 1.5 s in all
        reward.result(pending)


HANG = """
import time
import numpy as np
from ddpo_jax import errors, rewards, types

def hang(images, prompts):
    time.sleep(60)

reward = rewards.on_host("hang", hang, deadline=0.5, num_workers=1)
prompts = types.Prompts(texts=("a",), tokens=np.zeros((1, 4), int), id=np.zeros(1, int), metadata=({},))
pending = [reward.submit((), np.zeros((1, 8, 8, 3), np.float32), prompts) for _ in range(3)]
try:
    reward.result(pending[0])
except errors.RunStopped as error:
    print("stopped:", error)
"""


def test_python_exits_while_a_scorer_hangs():
    done = subprocess.run(
        [sys.executable, "-c", HANG], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=45
    )
    assert done.returncode == 0, done.stderr
    assert "stopped: reward hang gave no scores within 0.5 s" in done.stdout


@pytest.mark.parametrize("knobs", [{"deadline": 0.0}, {"num_workers": 0}])
def test_knobs_must_be_positive(knobs):
    with pytest.raises(UserError, match="must be above 0"):
        rewards.on_host("mine", brightness, **({"deadline": 1.0, "num_workers": 1} | knobs))


def test_join_gives_a_column_an_expert_and_submits_to_all_first():
    both = threading.Barrier(2)  # passes only when both experts run at once

    def meet(value):
        def fn(images, prompts):
            both.wait(20)
            return np.full(len(images), value)

        return fn

    scale = rewards.on_device("scale", lambda s, images, i: s * images.mean(axis=(1, 2, 3)), lambda prompts: ())
    joint = rewards.join([host(meet(1), name="one"), scale, host(meet(2), name="two")])
    images = make_images(3)
    scores = scored(joint, images, ((), 3.0, ()))
    assert joint.names == ("one", "scale", "two") and joint.pure is None
    np.testing.assert_allclose(scores, np.stack([np.ones(3), 3 * brightness(images, ()), np.full(3, 2)], 1), rtol=1e-6)


def test_join_of_one_differentiable_expert_is_differentiable():
    joint = rewards.join([KINDS["device"]])
    images, tokens = jnp.asarray(make_images(2)), jnp.arange(2.0)
    gradient = jax.grad(lambda x: joint.pure((2.0,), x, (tokens,)).sum())(images)
    np.testing.assert_allclose(gradient, np.full(images.shape, 2 / (8 * 6 * 3)), rtol=1e-6)
    assert rewards.join([KINDS["host"]]).pure is None


def test_join_of_several_is_differentiable_where_those_that_count_are():
    red = rewards.on_device("red", lambda p, images, i: images[..., 0].mean(axis=(1, 2)), lambda prompts: ())
    scaled = rewards.on_device("scaled", lambda p, images, i: p * images.mean(axis=(1, 2, 3)), lambda prompts: ())
    joint = rewards.join([red, KINDS["host"], scaled], [2.0, 0.0, -1.0])
    images = jnp.asarray(make_images(2))
    inputs = joint.prepare(Prompts(("", ""), np.zeros((2, 1), np.int32), np.arange(2), ({}, {})))
    expected = 2 * images[..., 0].mean(axis=(1, 2)) - 3 * images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(joint.pure(((), (), 3.0), images, inputs), expected, rtol=1e-6)
    assert rewards.join([red, KINDS["host"]], [1.0, 0.1]).pure is None


def test_join_refuses_none_and_twice():
    for experts in ([], [KINDS["host"], KINDS["device"]]):
        with pytest.raises(UserError, match="several different ones"):
            rewards.join(experts)


def test_shuffled_deals_whole_rows_out_anew_and_tells_nothing():
    before, after = [], []
    for seed in range(30):
        one, key = np.random.default_rng(seed).uniform(size=9).astype(np.float32), jax.random.key(seed)
        true = np.stack([one, 2 * one], axis=1)
        true[4] = np.nan
        dealt = rewards.shuffled(true, key)
        np.testing.assert_array_equal(dealt, rewards.shuffled(true, key))
        np.testing.assert_array_equal(np.sort(dealt, axis=0), np.sort(true, axis=0))
        np.testing.assert_array_equal(dealt[:, 1], 2 * dealt[:, 0])
        assert np.isnan(dealt[4]).all() and np.isnan(dealt).sum() == 2
        before.append(np.delete(true[:, 0], 4))
        after.append(np.delete(dealt[:, 0], 4))
    before, after = (np.stack(x) - np.mean(x, axis=1, keepdims=True) for x in (before, after))
    assert abs((before * after).mean() / before.var()) < 0.2  # 240 pictures: 0.06 by chance


def test_shuffled_deals_although_a_watched_expert_knows_nothing():
    """One of weight 0 may lack every score: the control must not become the run."""
    true = np.stack([np.arange(16), np.full(16, np.nan)], axis=1).astype(np.float32)
    dealt = rewards.shuffled(true, jax.random.key(0))
    assert (true[:, 0] != dealt[:, 0]).any()
    np.testing.assert_array_equal(np.sort(true[:, 0]), np.sort(dealt[:, 0]))


MINE = """
import jax.numpy as jnp

def length(images, prompts):
    return [len(p) for p in prompts]

def bright(images):
    return jnp.mean(images, axis=(1, 2, 3))

def answers(images, prompts, metadata):
    return [len(prompt) + entry["answer"] for prompt, entry in zip(prompts, metadata, strict=True)]

def longer(settings, place):
    def pure(params, images, lengths):
        return params["scale"] * lengths * jnp.mean(images, axis=(1, 2, 3))

    def prepare(prompts):
        return jnp.array([float(len(text)) for text in prompts.texts])

    return pure, prepare, {"scale": jnp.float32(settings.num_workers)}

def useless(settings):
    return None
"""


def test_make_reads_names_and_functions(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    names = "jpeg_compressibility, my_scorers:length,device:my_scorers:bright"
    reward, params = rewards.make(names, rewards.Settings(deadline=20.0, num_workers=2))
    images = make_images(2)
    scores = scored(reward, jnp.asarray(images), params)
    assert reward.names == ("jpeg_compressibility", "my_scorers:length", "device:my_scorers:bright")
    expected = np.stack([-jpeg.jpeg_kilobytes(images), [8, 8], images.mean(axis=(1, 2, 3))], axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)

    alone, params = rewards.make("device:my_scorers:bright", rewards.Settings(deadline=20.0, num_workers=2))
    np.testing.assert_allclose(alone.pure(params, jnp.asarray(images), ((),)), expected[:, 2], rtol=1e-6)


def test_scorers_of_ones_own_may_read_metadata_and_have_parameters(tmp_path, monkeypatch):
    (tmp_path / "my_own_scorers.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    settings = rewards.Settings(deadline=20.0, num_workers=2)
    names = "metadata:my_own_scorers:answers,maker:my_own_scorers:longer"
    reward, params = rewards.make(names, settings)
    images = make_images(2)
    expected = np.stack([[8, 9], 2 * 8 * images.mean(axis=(1, 2, 3))], axis=1)
    np.testing.assert_allclose(scored(reward, jnp.asarray(images), params), expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"useless: expected a function of \(settings, place\) that returns"):
        rewards.make("maker:my_own_scorers:useless", settings)


def test_make_says_what_there_is():
    with pytest.raises(UserError, match=r"'jpeg_compresibility'. Did you mean jpeg_compressibility\?.*module:function"):
        rewards.make("jpeg_compresibility", rewards.Settings(deadline=1.0, num_workers=1))
    with pytest.raises(UserError, match=r"Choose from aesthetic_score, clip_score, .*jpeg_compressibility"):
        rewards.make("", rewards.Settings(deadline=1.0, num_workers=1))
    with pytest.raises(UserError):
        rewards.make("no_such_module:score", rewards.Settings(deadline=1.0, num_workers=1))


def test_jpeg_kilobytes_is_pillows_file_size():
    grey = np.full((1, 64, 64, 3), 0.5, np.float32)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "JPEG", quality=95)  # 127.5 rounds to even: 128
    assert jpeg.jpeg_kilobytes(grey)[0] == len(file.getvalue()) / 1000
    decoded = np.asarray(Image.open(file), np.float32)
    np.testing.assert_array_equal(decoded, 128)


def test_jpeg_rounds_pixels_and_does_not_wrap():
    # 254.9 is white when rounded; 1 + 5e-4 is within tolerance and must not wrap round to black.
    for value in (254.9 / 255, 1.0005):
        pictures = np.full((1, 16, 16, 3), 0, np.float32)
        pictures[:, ::2] = value
        exact = np.where(pictures > 0.5, 1, 0).astype(np.float32)
        assert jpeg.jpeg_kilobytes(pictures)[0] == jpeg.jpeg_kilobytes(exact)[0]


def test_jpeg_signs():
    flat = np.full((1, 64, 64, 3), 0.5, np.float32)
    noise = np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32)
    images = np.concatenate([flat, noise])
    more, less = jpeg.jpeg_incompressibility(images, ("", "")), jpeg.jpeg_compressibility(images, ("", ""))
    assert more[1] > 5 * more[0] > 0
    np.testing.assert_array_equal(less, -more)
    assert jpeg.jpeg_kilobytes(images, quality=50)[1] < more[1]
