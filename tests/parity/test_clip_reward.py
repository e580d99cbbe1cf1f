"""The CLIP score beside transformers' CLIPModel, and its pixels beside transformers' CLIPImageProcessor."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CLIP, write_clip

from ddpo_jax.models import preprocess
from ddpo_jax.models.preprocess import STD
from ddpo_jax.rewards import clip_score
from ddpo_jax.types import Prompts

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from random_torch import nchw, nhwc
    from transformers import CLIPImageProcessorPil, CLIPTokenizer
    from transformers import CLIPModel as TorchCLIP

TEXTS = ("a fox", "an owl on a red striped background", "a whale")
SIZE = CLIP["vision_config"]["image_size"]
# Not every shape: Pillow 13 takes the height first where that is less work, and edges then shoot over elsewhere.
SHAPES = {
    "as large": (SIZE, SIZE),
    "larger": (64, 64),
    "odd and wide": (37, 61),
    "odd and tall": (53, 40),
    "smaller": (9, 13),
    "smaller and larger": (7, 50),
}


def photos(height, width):
    """Smooth pictures with sharp edges and saturated spots, as uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / 8
    waves = np.sin(rng.uniform(0, 2, (3, 1, 1, 3)) * y[..., None] + rng.uniform(0, 2, (3, 1, 1, 3)) * x[..., None])
    waves[:, height // 3 :, width // 2 :] *= -1.3
    return np.clip(127.5 + 127.5 * waves, 0, 255).round().astype(np.uint8)


def processed(images, size=SIZE):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return nhwc(processor(list(images), return_tensors="pt")["pixel_values"])


def theirs(folder, pixels):
    model = TorchCLIP.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(list(TEXTS), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], pixel_values=nchw(pixels))
    return 100 * torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def score(folder):
    pure, prepare, params = clip_score.make(str(folder), "{}")
    tokens = prepare(Prompts(TEXTS, None, None, None))
    return jax.jit(lambda images: pure(params, images, tokens))


def test_the_score_is_theirs_on_the_same_pixels(folder, score):
    images = jnp.asarray(photos(SIZE, SIZE), jnp.float32) / 255
    np.testing.assert_allclose(
        score(images), theirs(folder, preprocess.apply(images, preprocess.parse({}, SIZE))), atol=1e-4
    )


@pytest.mark.parametrize("size", [SIZE, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_pixels_are_theirs(shape, size):
    images = photos(*shape)
    ours = preprocess.apply(jnp.asarray(images, jnp.float32) / 255, preprocess.parse({}, size))
    difference = np.abs(np.asarray(ours) - processed(images, size)) * np.array(STD) * 255
    assert difference.max() <= 1.2  # of 255 levels; measured: 1.07, of which Pillow's rounding after each axis is 1
    assert difference.mean() <= 0.3  # measured: 0.27; one rounding is 0.25


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_score_is_theirs_from_the_file_on(folder, score, shape):
    images = photos(*shape)
    found = score(jnp.asarray(images, jnp.float32) / 255)
    np.testing.assert_allclose(found, theirs(folder, processed(images)), atol=0.1)  # measured: 0.045
    np.testing.assert_allclose(score(jnp.asarray(images)), found, rtol=1e-5, atol=1e-5)
