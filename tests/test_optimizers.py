"""The optimizers as configured: what a step does, seen through the updates alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpo_jax import optimizers
from ddpo_jax.errors import UserError

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "bias": jnp.array([1.0, -1.0])}


def make(name="adamw", **changed):
    settings = {
        "learning_rate": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "moment_dtype": "float32",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_warmup_steps": 0,
        "num_decay_steps": 0,
    }
    return optimizers.make(name, **{**settings, **changed})


def gradient(seed, norm):
    """A gradient of this global norm."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)
    return jax.tree.map(lambda leaf: leaf * (norm / optax.tree.norm(tree)), tree)


def updates_of(tx, gradients, params=PARAMS):
    """The update of each step, and the last state."""
    state, found, step = tx.init(params), [], jax.jit(tx.update)
    for grads in gradients:
        updates, state = step(grads, state, params)
        found.append(updates)
    return found, state


def assert_equal(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_gradients_are_clipped_before_adam():
    """Adam's moments must not see the excess: a huge gradient leaves the later steps as one of norm 1 would."""
    later = [gradient(1, 0.5), gradient(2, 0.5)]
    huge, _ = updates_of(make(), [gradient(0, 1e4), *later])
    unit, _ = updates_of(make(), [gradient(0, 1.0), *later])
    unclipped, _ = updates_of(make(max_grad_norm=1e9), [gradient(0, 1e4), *later])
    assert_equal(huge, unit, rtol=1e-4)
    assert optax.tree.norm(unclipped[2]) < 0.9 * optax.tree.norm(unit[2])


def test_gradients_below_the_norm_are_left_alone():
    gradients = [gradient(seed, 0.99) for seed in range(3)]
    assert_equal(updates_of(make(), gradients)[0], updates_of(make(max_grad_norm=1e9), gradients)[0], rtol=1e-6)


def rates_of(tx, count):
    """The learning rate of each step: under a constant gradient, Adam's update is the rate itself."""
    found, _ = updates_of(tx, [jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), PARAMS)] * count)
    return [-float(updates["bias"][0]) for updates in found]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1] * 6),
        ({"num_warmup_steps": 4}, [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1]),
        # ½ (1 + cos(π k / 6)) x 0.1 at k = 0, 2, 3, 4, 6, and 0 for ever
        ({"num_decay_steps": 6}, [0.1, None, 0.075, 0.05, 0.025, None, 0, 0]),
        ({"num_warmup_steps": 2, "num_decay_steps": 6}, [0, 0.05, 0.1, None, 0.05, None, 0, 0]),
    ],
)
def test_learning_rate_of_each_step(settings, expected):
    found = rates_of(make(**settings), len(expected))
    for step, (rate, value) in enumerate(zip(found, expected, strict=True)):
        if value is not None:
            assert rate == pytest.approx(value, abs=1e-5), step


def test_rate_never_rises_after_the_warm_up():
    rates = rates_of(make(num_warmup_steps=3, num_decay_steps=12), 14)
    assert np.argmax(rates) == 3 and (np.diff(rates[:4]) > 0).all() and (np.diff(rates[3:]) <= 1e-7).all()


def test_weight_decay_pulls_to_0_apart_from_the_gradient():
    gradients = [gradient(seed, 0.5) for seed in range(3)]
    plain, _ = updates_of(make(), gradients)
    decayed, _ = updates_of(make(weight_decay=0.01), gradients)
    expected = [jax.tree.map(lambda u, p: u - 0.1 * 0.01 * p, updates, PARAMS) for updates in plain]
    assert_equal(decayed, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])  # the square of the last overflows
def test_a_gradient_that_is_not_finite_is_as_if_it_had_never_been(bad, optimizer):
    good = [gradient(seed, 0.5) for seed in range(3)]
    broken = {**good[1], "bias": jnp.array([bad, 1.0])}
    tx = make(optimizer, weight_decay=0.01, num_warmup_steps=2)
    expected, state = updates_of(tx, good)
    found, skipped = updates_of(tx, [good[0], broken, broken, *good[1:]])
    for updates in found[1:3]:
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), updates)
    assert_equal([found[0], *found[3:]], expected, rtol=1e-6)
    assert_equal(skipped.inner_state, state.inner_state, rtol=1e-6)
    assert (int(skipped.total_notfinite), int(skipped.notfinite_count)) == (2, 0)
    assert int(state.total_notfinite) == 0


def test_first_moments_in_half_precision():
    """Half the bytes of the first moments alone, and steps that differ by their rounding."""
    gradients = [gradient(seed, 0.5) for seed in range(4)]
    exact, state = updates_of(make(), gradients)
    rounded, small = updates_of(make(moment_dtype="bfloat16"), gradients)
    found = {str(leaf.dtype) for leaf in jax.tree.leaves(optax.tree.get(small, "mu"))}
    assert found == {"bfloat16"}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(small, "nu"))} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {np.dtype(np.float32)}
    assert_equal(rounded, exact, rtol=0.02, atol=1e-3)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True))


def test_adafactor_steps_by_the_sign_of_a_first_gradient():
    """Nothing is known of its size yet: g / √g² times the rate, with decay beside it, as AdamW's."""
    grads = gradient(0, 0.5)
    (first,), _ = updates_of(make("adafactor", weight_decay=0.01), [grads])
    assert_equal(first, jax.tree.map(lambda g, p: -0.1 * (jnp.sign(g) + 0.01 * p), grads, PARAMS), rtol=1e-3)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    params = {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(make(name).init(params))) for name in ("adamw", "adafactor")
    }
    assert sizes["adamw"] > 2 * 256 * 512
    assert sizes["adafactor"] < 2 * (256 + 512 + 512)


def test_gradients_that_are_never_finite_are_never_applied():
    tx = make()
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    for count in range(1, 50):
        updates, state = step(broken, state, PARAMS)
        assert int(state.notfinite_count) == count
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, r"train\.learning_rate=0\.0"),
        ({"learning_rate": float("nan")}, r"train\.learning_rate=nan"),
        ({"max_grad_norm": 0.0}, r"train\.max_grad_norm=0\.0"),
        ({"max_grad_norm": -1.0}, r"train\.max_grad_norm=-1\.0"),
        ({"num_warmup_steps": -1}, r"train\.num_warmup_steps=-1"),
        ({"num_decay_steps": -1}, r"train\.num_decay_steps=-1"),
        ({"num_warmup_steps": 5, "num_decay_steps": 5}, r"train\.num_decay_steps=5: .* num_warmup_steps=5"),
        ({"b1": 1.0}, r"train\.adam_beta1=1\.0"),
        ({"b2": -0.1}, r"train\.adam_beta2=-0\.1"),
        ({"moment_dtype": "float16"}, r"train\.adam_moment_dtype='float16': expected one of float32, bfloat16"),
        ({"name": "sgd"}, r"train\.optimizer='sgd': expected 'adamw' or 'adafactor'"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
