"""Guidance: the network under two conditions in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import write_folder

from ddpo_jax.models.stable_diffusion import freeze, load
from ddpo_jax.models.tokenizer import tokenize_all
from ddpo_jax.policy import make_policy


@pytest.mark.parametrize("family", [pytest.param("1", marks=pytest.mark.slow), "xl"])
def test_what_no_condition_changes_is_computed_once(tmp_path, family):
    """Values and gradients are those of the network with each condition by itself; the work is less."""
    model, pretrained = load(str(write_folder(tmp_path, family)), dtype=jnp.float32)
    uncond = freeze(model, pretrained).uncond
    cond = model.encode_text(pretrained.text, jnp.asarray(tokenize_all(pretrained.tokenizers, ["a fox", "two ants"])))
    x_t, weight = jax.random.normal(jax.random.key(0), (2, 2, *model.latent_shape))
    t = jnp.array([801.0, 401.0])

    def guided(policy):
        def total(params):
            return jnp.vdot(weight, policy.transition(params, x_t, t, t - 400, cond, uncond).mean)

        return jax.jit(jax.value_and_grad(total)).lower(pretrained.denoiser).compile()

    once, twice = (
        guided(make_policy(one, num_steps=2, eta=1.0, guidance_scale=5.0))
        for one in (model, model._replace(predict_each=None))
    )
    found, expected = (program(pretrained.denoiser) for program in (once, twice))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)
    assert once.cost_analysis()["flops"] < 0.99 * twice.cost_analysis()["flops"]


def test_any_number_of_conditions(small_folder):
    model, pretrained = load(str(small_folder), dtype=jnp.float32)
    conds = [
        model.encode_text(pretrained.text, jnp.asarray(tokenize_all(pretrained.tokenizers, texts)))
        for texts in (["a fox", "two ants"], ["", "red"], [""])
    ]
    x_t, t = jax.random.normal(jax.random.key(0), (2, *model.latent_shape)), jnp.array([801.0, 401.0])
    found = model.predict_each(pretrained.denoiser, x_t, t, conds)
    for one, cond in zip(found, conds, strict=True):
        cond = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, *leaf.shape[1:])), cond)
        np.testing.assert_allclose(one, model.predict(pretrained.denoiser, x_t, t, cond), rtol=1e-4, atol=1e-5)
