"""The CLIP score: it knows right prompts from wrong, has a gradient, and names what is broken in a CLIP's folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CLIP, write_clip

from ddpo_jax import rewards
from ddpo_jax.errors import UserError
from ddpo_jax.models import preprocess
from ddpo_jax.models.preprocess import MEAN, STD
from ddpo_jax.rewards import clip_score
from ddpo_jax.tiny.render import render
from ddpo_jax.types import Prompts

SIZE = CLIP["vision_config"]["image_size"]


def prompts_of(*texts):
    """The tokens are another model's: the CLIP makes its own."""
    count = len(texts)
    return Prompts(texts, np.full((count, 3), 9**9), np.arange(count), ({},) * count)


def make_images(b, height, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((b, height, width, 3), dtype=np.float32))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """Do not write to it."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def small_score(small_clip):
    return clip_score.make(str(small_clip), "{}")


def test_the_embedded_clip_knows_whose_prompt_it_is():
    images, captions = zip(*(render(10**9 - i) for i in range(48)), strict=True)
    images = jnp.asarray(np.stack(images), jnp.float32) / 255
    reward, params = rewards.make("clip_score", rewards.Settings(deadline=20.0, num_workers=1, clip_model="tiny"))
    own, others = (
        reward.result(reward.submit(params, images, prompts_of(*texts)))[:, 0]
        for texts in (captions, captions[1:] + captions[:1])
    )
    assert reward.names == ("clip_score",)
    assert (np.abs(own) <= 100).all()
    assert (own > others).mean() >= 0.9 and own.mean() > others.mean() + 30


def test_a_template_stands_around_the_prompt(small_clip, small_score):
    images = make_images(1, SIZE, SIZE)
    pure, prepare, params = clip_score.make(str(small_clip), "a {}, drawn")
    found = pure(params, images, prepare(prompts_of("fox {}")))
    assert found == small_score[0](params, images, small_score[1](prompts_of("a fox {}, drawn")))
    assert found != pure(params, images, prepare(prompts_of("owl")))
    with pytest.raises(UserError, match=r"reward\.clip_template='a photo': expected {} in it"):
        clip_score.make(str(small_clip), "a photo")


def test_parameters_are_an_argument(small_score):
    pure, prepare, params = small_score
    images, tokens = make_images(2, SIZE, SIZE), prepare(prompts_of("a fox", "an owl"))
    consts = jax.make_jaxpr(pure)(params, images, tokens).consts
    assert sum(np.size(const) for const in consts) <= 100
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_each_picture_has_its_own_score(small_score):
    pure, prepare, params = small_score
    images, texts = make_images(3, SIZE, SIZE), ("a fox", "an owl", "a whale")
    scores = pure(params, images, prepare(prompts_of(*texts)))
    np.testing.assert_allclose(
        pure(params, images[::-1], prepare(prompts_of(*texts[::-1]))), scores[::-1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (24, 20), (12, 30)])
def test_the_gradient_is_the_slope(small_score, shape):
    pure, prepare, params = small_score
    tokens = prepare(prompts_of("a fox"))
    images = 0.25 + 0.5 * make_images(1, *shape)
    score = jax.jit(lambda x: pure(params, x, tokens)[0])
    slopes = jax.grad(score)(images)
    direction = slopes / jnp.linalg.norm(slopes)
    step = 3e-2
    slope = (score(images + step * direction) - score(images - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, jnp.linalg.norm(slopes), rtol=2e-2)


def seen(images, size):
    """What the CLIP sees, as pixels in [0, 1] again."""
    mean, std = (jnp.array(values)[None, None, None] for values in (MEAN, STD))
    return preprocess.apply(images, preprocess.parse({}, size)) * std + mean


def test_a_picture_of_the_right_size_is_left_alone():
    images = make_images(2, SIZE, SIZE)
    np.testing.assert_allclose(seen(images, SIZE), images, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16, 23])
@pytest.mark.parametrize("shape", [(16, 16), (31, 17), (10, 40)])
def test_a_plain_picture_stays_plain(shape, size):
    plain = jnp.broadcast_to(jnp.array([0.0, 0.3, 1.0])[None, None, None], (1, *shape, 3))
    np.testing.assert_allclose(seen(plain, size), jnp.broadcast_to(plain[:, :1, :1], (1, size, size, 3)), atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [8, 4])
def test_only_the_middle_is_seen(size, transpose):
    images = make_images(1, 8, 24)
    others = images.at[:, :, :4].set(0).at[:, :, 20:].set(1)  # out of the bicubic filter's reach
    if transpose:
        images, others = (x.transpose(0, 2, 1, 3) for x in (images, others))
    np.testing.assert_allclose(seen(images, size), seen(others, size), atol=1e-6)
    middle = images[:, 8:16] if transpose else images[:, :, 8:16]
    if size == 8:
        np.testing.assert_allclose(seen(images, size), middle, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1)])
def test_of_a_very_long_picture_only_what_is_seen_is_made(shape):
    """The whole of it would be 500 times as large as what is seen."""
    shown = jax.eval_shape(lambda x: seen(x, 64), jnp.zeros((1, *shape, 3)))
    assert shown.shape == (1, 64, 64, 3)
    program = jax.make_jaxpr(lambda x: seen(x, 64))(jnp.zeros((1, *shape, 3)))
    sizes = [out.aval.size for equation in program.eqns for out in equation.outvars]
    assert max(sizes) <= 3 * 64 * 500
    images = make_images(1, *shape)
    column = images[:, :, 249:251].mean(axis=2) if shape[0] == 1 else images[:, 249:251].mean(axis=1)
    np.testing.assert_allclose(seen(images, 64)[:, 31:33, 31:33].mean(axis=(1, 2)), column[:, 0], atol=0.1)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def edit_config(**changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({name: value for name, value in fields.items() if value is not None})
        )

    return change


def no_tokenizer(folder):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink()


BROKEN = {
    "no folder": (shutil.rmtree, "reward.clip_model=.*no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    "half the weights": (cut_weights, r"model\.safetensors: not a whole safetensors file"),
    "no tokenizer": (no_tokenizer, "expected vocab.json and merges.txt"),
    "another model": (edit_config(model_type="siglip"), "model_type 'siglip' is not supported"),
    "half a config": (edit_config(vision_config=None), "the field 'vision_config' is missing"),
    "wider": (edit_config(projection_dim=24), "has shape"),
    "fewer tokens": (edit_config(text_config=CLIP["text_config"] | {"vocab_size": 500}), "the tokenizer makes"),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_clip_is_one_error(small_clip, tmp_path, break_it, message):
    folder = shutil.copytree(small_clip, tmp_path / "clip")
    break_it(folder)
    with pytest.raises(UserError, match=message) as raised:
        rewards.make("clip_score", rewards.Settings(deadline=1.0, num_workers=1, clip_model=str(folder)))
    assert "\n" not in str(raised.value)
