"""Training starts at the checkpoint, moves only what it says, and never takes the checkpoint with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import UNET

from ddpo_jax import finetune
from ddpo_jax.errors import UserError
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.models.unet_config import unet_config

KEY = jax.random.key(0)
RANK = 2


@pytest.fixture
def pretrained():
    """Two attention blocks among parameters that are no target, under diffusers' names."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def attention(width):
        return {
            "to_q": {"kernel": array(8, 8)},
            "to_k": {"kernel": array(width, 8)},
            "to_v": {"kernel": array(width, 8)},
            "to_out_0": {"kernel": array(8, 8), "bias": array(8)},
        }

    block = {"attn1": attention(8), "attn2": attention(6), "ff": {"net_2": {"kernel": array(32, 8)}}}
    return {
        "conv_in": {"kernel": array(3, 3, 4, 8), "bias": array(8)},
        "down_blocks_0": {"attentions_0": {"transformer_blocks_0": block}},
        "time_embedding": {"linear_1": {"kernel": array(8, 8)}},
    }


def names(tree):
    return {
        "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def trained(tuning, pretrained, seed=1):
    """Factors with no 0 among them, as after some training."""
    rng = np.random.default_rng(seed)
    factors = tuning.init(KEY, pretrained)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), factors)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


TUNINGS = {
    "full": finetune.full,
    "lora": lambda: finetune.lora(rank=RANK, alpha=4.0),
    "lora on a convolution": lambda: finetune.lora(rank=2, alpha=2.0, targets=r"conv_in/kernel$"),
    "lora on conv-free kernels": lambda: finetune.lora(rank=1, alpha=1.0, targets=r"linear_1/kernel$|net_2/kernel$"),
}


@pytest.mark.parametrize("make", TUNINGS.values(), ids=TUNINGS)
def test_training_starts_at_the_checkpoint(make, pretrained):
    tuning = make()
    trainable = jax.jit(tuning.init)(KEY, pretrained)
    assert_same(tuning.merge(pretrained, trainable), pretrained)
    assert_same(jax.jit(tuning.merge)(pretrained, trainable), pretrained)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_reference_outlives_a_donated_state(wrap, pretrained):
    before = jax.tree.map(np.array, pretrained)
    trainable = wrap(finetune.full().init)(KEY, pretrained)
    for leaf in jax.tree.leaves(trainable):
        leaf.delete()  # what donation does
    assert_same(pretrained, before)


def test_full_needs_no_reference_to_merge(pretrained):
    tuning = finetune.full()
    assert not tuning.reads_pretrained
    assert_same(tuning.merge(None, pretrained), pretrained)


def test_lora_reads_the_reference():
    assert finetune.lora(rank=1, alpha=1.0).reads_pretrained


def test_lora_trains_factors_of_the_attention_kernels_alone(pretrained):
    tuning = finetune.lora(rank=RANK, alpha=4.0)
    factors = tuning.init(KEY, pretrained)
    kernels = {name: leaf for name, leaf in names(pretrained).items() if "attn" in name and name.endswith("kernel")}
    assert factors.keys() == kernels.keys() and len(factors) == 8
    for name, factor in factors.items():
        rows, columns = kernels[name].shape
        assert factor.keys() == {"A", "B"}
        assert (factor["A"].shape, factor["B"].shape) == ((rows, RANK), (RANK, columns))

    before, after = names(pretrained), names(tuning.merge(pretrained, trained(tuning, pretrained)))
    assert before.keys() == after.keys()
    for name in before:
        changed = np.linalg.matrix_rank(after[name] - before[name], tol=1e-3) if name in kernels else None
        if name in kernels:
            assert changed == RANK, name
        else:
            np.testing.assert_array_equal(after[name], before[name])


def test_an_adapted_convolution_is_two_in_a_row(pretrained):
    """One of its own size to r channels, then 1x1 from them, added to what the kernel gives."""
    tuning = finetune.lora(rank=RANK, alpha=4.0, targets="conv_in/kernel$")
    factors = trained(tuning, pretrained)
    ((name, (a, b)),) = tuning.adapters(factors).items()
    assert (name, a.shape, b.shape) == ("conv_in/kernel", (3, 3, 4, RANK), (RANK, 8))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 5, 4)), jnp.float32)
    kernel = pretrained["conv_in"]["kernel"]
    expected = convolve(x, kernel) + convolve(convolve(x, a), b[None, None])
    np.testing.assert_allclose(
        convolve(x, tuning.merge(pretrained, factors)["conv_in"]["kernel"]), expected, rtol=1e-4, atol=1e-5
    )


def test_adapters_of_another_denoiser_are_refused(pretrained):
    tuning = finetune.lora(rank=RANK, alpha=4.0)
    factors = trained(tuning, pretrained)
    with pytest.raises(UserError, match="another denoiser: it has no mid_block/to_q/kernel"):
        tuning.merge(pretrained, {"mid_block/to_q/kernel": next(iter(factors.values()))})


def test_the_kernels_that_change_are_the_targets(pretrained):
    assert all(finetune.full().changes(name) for name in names(pretrained))
    tuning = finetune.lora(rank=RANK, alpha=4.0)
    assert {name for name in names(pretrained) if tuning.changes(name)} == tuning.init(KEY, pretrained).keys()


def test_the_first_gradient_reaches_every_b_and_then_every_a(pretrained):
    """B = 0 hides A from the first step; were both 0, or both hidden, nothing would ever be learned."""
    tuning = finetune.lora(rank=RANK, alpha=4.0)

    def loss(trainable):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tuning.merge(pretrained, trainable)))

    first = jax.grad(loss)(tuning.init(KEY, pretrained))
    assert all(np.any(factor["B"]) and not np.any(factor["A"]) for factor in first.values())
    later = jax.grad(loss)(trained(tuning, pretrained))
    assert all(np.any(factor["B"]) and np.any(factor["A"]) for factor in later.values())


def test_alpha_over_rank_scales_the_change(pretrained):
    """alpha / r times the product: twice alpha is twice the change, and r times the columns of A are worth r / r."""
    name = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
    narrow = {name: {"A": jnp.ones((8, 1)), "B": jnp.ones((1, 8))}}
    wide = {name: {"A": jnp.ones((8, 4)), "B": jnp.ones((4, 8))}}

    def change(factors, **settings):
        merged = finetune.lora(**settings).merge(pretrained, factors)
        return names(merged)[name] - names(pretrained)[name]

    np.testing.assert_allclose(change(narrow, rank=1, alpha=3.0), 3.0, rtol=1e-5)
    np.testing.assert_allclose(change(wide, rank=4, alpha=3.0), 3.0, rtol=1e-5)


def test_factors_are_drawn_anew_for_each_kernel_from_the_key_alone(pretrained):
    tuning = finetune.lora(rank=64, alpha=64.0)
    factors = tuning.init(KEY, pretrained)
    assert_same(tuning.init(KEY, pretrained), factors)
    draws = [factor["A"][:6].ravel() for factor in factors.values()]
    correlation = np.corrcoef(np.stack(draws))
    assert np.abs(correlation - np.eye(len(draws))).max() < 0.25
    assert np.std(np.concatenate(draws)) * 64 == pytest.approx(1, abs=0.05)
    other = tuning.init(jax.random.key(1), pretrained)
    assert all(np.any(other[name]["A"] != factors[name]["A"]) for name in factors)


def test_a_small_change_of_a_bfloat16_kernel_is_not_rounded_away(pretrained):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pretrained)
    tuning = finetune.lora(rank=RANK, alpha=float(RANK))
    factors = jax.tree.map(lambda leaf: 1e-3 * leaf, trained(tuning, half))  # changes of about 1e-6
    assert {leaf.dtype for leaf in jax.tree.leaves(tuning.init(KEY, half))} == {jnp.dtype(jnp.float32)}
    merged = names(tuning.merge(half, factors))
    for name, factor in factors.items():
        change = merged[name] - names(half)[name].astype(np.float32)
        np.testing.assert_allclose(change, factor["A"] @ factor["B"], atol=3e-7)


def test_default_targets_are_the_attention_kernels_of_a_real_unet():
    """Two attentions of four kernels in each of the transformer blocks: down 1, middle 1, up 2."""
    unet = UNet2DConditionModel(unet_config(UNET))
    inputs = (jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, UNET["cross_attention_dim"])))
    params = jax.eval_shape(unet.init, KEY, *inputs)["params"]
    factors = jax.eval_shape(finetune.lora(rank=4, alpha=4.0).init, KEY, params)
    assert len(factors) == 2 * 4 * (1 + 1 + 2)
    assert all("/attn1/" in name or "/attn2/" in name for name in factors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "no_such_block"}, r"train\.lora_targets='no_such_block' matches no kernel"),
        ({"targets": "conv_in/bias"}, r"conv_in/bias has shape \(8,\); expected kernels only"),
        ({"targets": "("}, r"train\.lora_targets='\('.*not a regular expression"),
        ({"rank": 0}, r"train\.lora_rank=0"),
        ({"rank": -3}, r"train\.lora_rank=-3"),
    ],
)
def test_adapters_that_cannot_be_made(pretrained, settings, message):
    with pytest.raises(UserError, match=message):
        finetune.lora(**{"rank": RANK, "alpha": 4.0, **settings}).init(KEY, pretrained)
