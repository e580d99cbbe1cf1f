"""3x3 convolutions in fewer products: the same values and gradients, where they are taken, and by whom."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import UNET, random_params
from small_run import distance, silent, small_config

from ddpo_jax.build import build
from ddpo_jax.errors import UserError
from ddpo_jax.models import winograd
from ddpo_jax.models.kernels import Kernels, choose_kernels
from ddpo_jax.models.layers import Upsample, conv
from ddpo_jax.models.stable_diffusion import load
from ddpo_jax.models.tokenizer import tokenize_all
from ddpo_jax.models.unet import REMAT, UNet2DConditionModel
from ddpo_jax.models.unet_config import unet_config


def direct(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def direct_of_doubled(x, kernel):
    return direct(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


PAIRS = {"plain": (winograd.convolve, direct), "doubled": (winograd.convolve_doubled, direct_of_doubled)}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 2, 4), (2, 1, 1, 3), (1, 7, 9, 2), (3, 8, 8, 5)])
def test_values_and_gradients_are_the_convolutions(kind, shape):
    ours, plain = PAIRS[kind]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(3, 3, shape[-1], 6)))
        weight = jnp.asarray(rng.normal(size=plain(x, kernel).shape))

        def values(function):
            def total(x, kernel):
                return jnp.sum(weight * function(x, kernel))

            return function(x, kernel), *jax.jit(jax.grad(total, (0, 1)))(x, kernel)

        for found, expected in zip(values(ours), values(plain), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", PAIRS)
def test_rounding_is_that_of_the_plain_convolution(kind):
    """In float32, of as many channels as a network has, beside float64."""
    ours, plain = PAIRS[kind]
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 8, 8, 192)), rng.normal(size=(3, 3, 192, 64))
    with jax.enable_x64(True):
        exact = np.asarray(plain(jnp.asarray(x), jnp.asarray(kernel)))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    found, expected = (distance(function(x, kernel), exact) for function in (ours, plain))
    assert found < 1e-6 and found < 3 * expected


@pytest.mark.parametrize(
    ("shape", "features", "size", "dtype", "expected"),
    [
        ((32, 8, 8, 64), 64, 3, jnp.float32, True),
        ((1, 8, 8, 64), 64, 3, jnp.float32, True),  # whatever the batch is
        ((32, 8, 8, 64), 64, 1, jnp.float32, False),
        ((32, 8, 8, 64), 4, 3, jnp.float32, False),
        ((32, 64, 64, 32), 64, 3, jnp.float32, False),
        ((32, 8, 8, 64), 64, 3, jnp.bfloat16, False),
        ((2, 8, 8, 1280), 1280, 3, jnp.float32, False),
        ((2, 16, 16, 1280), 1280, 3, jnp.float32, True),
        ((2, 64, 64, 960), 320, 3, jnp.float32, True),
        ((2, 512, 512, 128), 128, 3, jnp.float32, False),  # its sums would not fit
    ],
)
def test_which_convolutions_are_computed_so(shape, features, size, dtype, expected):
    inputs = (jax.ShapeDtypeStruct(size, dtype) for size in (shape, (size, size, shape[-1], features)))
    told = []
    jax.eval_shape(lambda x, kernel: told.append(winograd.suits(x, kernel)), *inputs)
    assert told == [expected]


def layers(method):
    """Each layer that is asked to, and one of another stride."""
    width = winograd.CHANNELS
    yield conv(width, 3, jnp.float32, "conv", method=method), width
    yield conv(width, 3, jnp.float32, "conv", method=method, stride=2), width
    yield conv(width, 1, jnp.float32, "conv", method=method), width
    yield conv(width, 3, jnp.float32, "conv", method=method), width // 2  # channels are too few
    yield Upsample(jnp.float32, method), width


def test_layers_do_as_they_are_told():
    told = []
    for (ours, channels), (plain, _) in zip(layers("winograd"), layers("direct"), strict=True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 6, channels))
        params = plain.init(jax.random.key(1), x)
        assert jax.tree.structure(ours.init(jax.random.key(1), x)) == jax.tree.structure(params)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # the biases too
        np.testing.assert_allclose(ours.apply(params, x), plain.apply(params, x), atol=2e-5)
        told.append("conv_general_dilated" not in str(jax.make_jaxpr(ours.apply)(params, x)))
    assert told == [True, False, False, False, True]


WIDE = unet_config(UNET | {"block_out_channels": [64, 64], "norm_num_groups": 8})


@pytest.fixture(scope="module")
def wide():
    inputs = (jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), jnp.full(2, 7.0), jnp.ones((2, 3, 16)))
    return inputs, random_params(UNet2DConditionModel(WIDE), 1, *inputs)


def total(inputs, remat, kernels):
    module = UNet2DConditionModel(WIDE, remat=remat, kernels=kernels)
    return lambda params: jnp.sum(jnp.sin(3 * module.apply({"params": params}, *inputs)))


def test_what_is_computed_again_keeps_these_products(wide):
    """Of the forward pass by remat: as much as the plain convolutions' results."""
    inputs, params = wide

    def kept(remat, method):
        function = total(inputs, remat, Kernels(convolution=method))
        backward = jax.eval_shape(partial(jax.vjp, function), params)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("products", "winograd") == kept("products", "direct")
    assert kept("none", "winograd") > kept("products", "winograd") > kept("blocks", "winograd")


@pytest.fixture(scope="module")
def plain_gradient(wide):
    inputs, params = wide
    return jax.jit(jax.grad(total(inputs, "none", Kernels())))(params)


@pytest.mark.parametrize(
    "remat",
    [remat if remat in ("none", "products") else pytest.param(remat, marks=pytest.mark.slow) for remat in REMAT],
)
def test_the_denoisers_gradient_is_the_same(wide, plain_gradient, remat):
    inputs, params = wide
    found = jax.jit(jax.grad(total(inputs, remat, Kernels(convolution="winograd"))))(params)
    assert distance(found, plain_gradient) < 1e-5


def test_the_embedded_model_draws_the_same():
    found = []
    for method in ("direct", "winograd"):
        model, pretrained = load("tiny", dtype=jnp.float32, convolution=method)
        cond = model.encode_text(pretrained.text, jnp.asarray(tokenize_all(pretrained.tokenizers, ["a fox", "an owl"])))
        x_t = jax.random.normal(jax.random.key(0), (2, *model.latent_shape))
        predicted = model.predict(pretrained.denoiser, x_t, jnp.full(2, 401.0), cond)
        pixels = model.decode(pretrained.vae, x_t)
        found.append((predicted, pixels, model.encode(pretrained.vae, found[0][1] if found else pixels).mean))
    for one, other in zip(*found, strict=True):
        assert not np.array_equal(one, other)
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "winograd"), ("gpu", "direct"), ("tpu", "direct")])
def test_the_method_that_is_chosen(monkeypatch, platform, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert choose_kernels("xla", "auto", dtype=jnp.float32) == Kernels("xla", expected)
    assert choose_kernels("xla", "direct", dtype=jnp.float32).convolution == "direct"
    with pytest.raises(UserError, match="convolution='fft': expected 'auto', 'direct', 'winograd'"):
        choose_kernels("xla", "fft", dtype=jnp.float32)


def test_a_run_computes_as_its_config_says():
    with pytest.raises(UserError, match="convolution='fft'"):
        build(small_config("tiny", convolution="fft"), silent)
