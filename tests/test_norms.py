"""Normalisation: its values and its written-out gradients against the definition, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models.layers import product
from ddpo_jax.models.norms import over_groups, over_last

EPSILON = 1e-5


def normed(x, axes):
    centred = x - x.mean(axis=axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=axes, keepdims=True) + EPSILON)


def groups_by_definition(x, scale, bias):
    grouped = x.reshape(*x.shape[:-1], 3, -1)
    return normed(grouped, (1, 3)).reshape(x.shape) * scale[None, None] + bias[None, None]


def last_by_definition(x, scale, bias):
    return normed(x, (-1,)) * scale[None, None] + bias[None, None]


NORMS = {
    "groups": (lambda *inputs: over_groups(*inputs, 3, EPSILON), groups_by_definition),
    "last": (lambda *inputs: over_last(*inputs, EPSILON), last_by_definition),
}


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients_are_the_definitions(name, offset):
    rng = np.random.default_rng(0)
    ours, definition = NORMS[name]
    with jax.enable_x64():
        inputs = [jnp.asarray(rng.normal(size=shape)) for shape in ((2, 5, 12), (12,), (12,))]
        inputs[0] = inputs[0] + offset
        weight = jnp.asarray(rng.normal(size=(2, 5, 12)))

        def total(fn):
            return jax.value_and_grad(lambda *inputs: jnp.sum(weight * fn(*inputs)), (0, 1, 2))(*inputs)

        found, expected = map(jax.tree.leaves, (total(ours), total(definition)))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_half_precision_are_float32(name):
    x = jnp.asarray(np.random.default_rng(0).normal(300, 1, size=(2, 64, 12)), jnp.bfloat16)
    scale, bias = jnp.ones(12), jnp.zeros(12)
    ours, definition = NORMS[name]
    out, back = jax.vjp(ours, x, scale, bias)
    assert [leaf.dtype for leaf in (out, *back(out))] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(out, definition(x.astype(jnp.float32), scale, bias), atol=0.02)


def test_a_product_has_the_gradients_of_one():
    rng = np.random.default_rng(0)
    x, kernel, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 4), (4, 3), (6, 3)))

    def total(fn):
        return jax.jit(jax.value_and_grad(lambda *both: jnp.sum(weight * fn(*both)), (0, 1)))(x, kernel)

    found, expected = map(jax.tree.leaves, (total(product), total(jnp.matmul)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
