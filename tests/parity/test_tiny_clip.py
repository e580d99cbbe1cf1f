"""The tiny CLIP's folder opens in transformers by itself, and tells there what it tells here."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models.clip import CLIPModel, clip_config
from ddpo_jax.models.folder import read_json, read_weights
from ddpo_jax.models.locate import TINY
from ddpo_jax.models.preprocess import MEAN, STD
from ddpo_jax.tiny.fit import rendered

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers import CLIPModel as TorchCLIP
    from transformers import CLIPTokenizer

FOLDER = TINY.parent / "tiny-clip"


def test_tiny_clip_in_transformers():
    images, captions = rendered(9_200_000_000, 16)
    tokens = CLIPTokenizer.from_pretrained(FOLDER)(captions, padding="max_length", return_tensors="np")["input_ids"]
    pixels = (images - np.float32(MEAN)) / np.float32(STD)
    model = TorchCLIP.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), torch.tensor(pixels.transpose(0, 3, 1, 2).copy())).logits_per_image.numpy()

    module = CLIPModel(clip_config(read_json(FOLDER / "config.json")))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(tokens), jnp.asarray(pixels))["params"]
    params = read_weights([FOLDER / "model.safetensors"], shapes)
    ours = module.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(pixels))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # logits to ±20
    right = [captions[best] == caption for best, caption in zip(theirs.argmax(axis=1), captions, strict=True)]
    assert np.mean(right) > 0.5
