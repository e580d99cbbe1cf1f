"""Layers that compute in another order than their definitions say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models.layers import Upsample, conv


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 3), (1, 8, 8, 6)])
def test_doubling_and_convolving_at_once(shape):
    """The kernel's own sums are taken first: equal to rounding, borders and gradients too."""

    def doubled(params, x):
        return conv(shape[-1], 3, jnp.float64, "conv").apply({"params": params}, x.repeat(2, 1).repeat(2, 2))

    def at_once(params, x):
        return Upsample(jnp.float64).apply({"params": {"conv": params}}, x)

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weight = (jnp.asarray(rng.normal(size=size)) for size in (shape, (shape[0], 2 * shape[1], 2 * shape[2], 1)))
        (params,) = Upsample(jnp.float64).init(jax.random.key(0), x)["params"].values()
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        np.testing.assert_allclose(at_once(params, x), doubled(params, x), rtol=1e-12, atol=1e-12)

        def gradients(function):
            return jax.grad(lambda *inputs: (weight * function(*inputs)).sum(), argnums=(0, 1))(params, x)

        for found, expected in zip(*(jax.tree.leaves(gradients(f)) for f in (at_once, doubled)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_doubling_in_half_precision():
    """Rounds its kernels' sums, as it rounds its kernels."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    params = Upsample().init(jax.random.key(1), x)["params"]
    exact = Upsample().apply({"params": params}, x)
    half = Upsample(jnp.bfloat16).apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half - exact) < 0.005 * jnp.linalg.norm(exact)
