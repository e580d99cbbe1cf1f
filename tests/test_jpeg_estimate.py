"""The JPEG size estimate: beside Pillow's files, scipy's DCT, and finite differences."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage, stats

from ddpo_jax import rewards
from ddpo_jax.errors import UserError
from ddpo_jax.rewards import jpeg, jpeg_estimate
from ddpo_jax.tiny.render import render
from ddpo_jax.types import Prompts

KINDS = ("gradient", "noise", "animal", "mixture", "blurred", "saturated", "grey", "texture")
SIZES = {(64, 64): 280, (128, 96): 80, (33, 50): 140}  # 500 pictures; the last fills no block and no pair of blocks

estimate = jax.jit(jpeg_estimate.jpeg_kilobytes_estimate, static_argnames="quality")
bit_counts = jax.jit(jpeg_estimate.bit_counts, static_argnames="quality")


def picture(rng, kind, H, W):
    y, x = np.mgrid[0:H, 0:W, 0:1][:2] / max(H, W) - 0.5

    def gradient():
        across, down, both = rng.normal(0, 0.5, (3, 3))
        return 0.5 + across * x + down * y + both * x * y

    def noise():
        return rng.normal(0, np.exp(rng.uniform(np.log(0.003), np.log(0.5))), (H, W, 3))

    def animal():
        drawn = Image.fromarray(render(int(rng.integers(10**6)))[0])
        return np.asarray(drawn.resize((W, H), Image.Resampling.BICUBIC)) / 255

    def waves():
        frequencies = rng.normal(0, rng.uniform(3, 60), (int(rng.integers(1, 5)), 2))
        return sum(np.sin(u * x + v * y + rng.uniform(0, 6)) * rng.normal(0, 0.2, 3) for u, v in frequencies)

    def any_of():
        return animal() if rng.random() < 0.5 else gradient() + noise()

    match kind:
        case "gradient":
            pixels = gradient()
        case "noise":
            pixels = rng.random(3) + noise()
        case "animal":
            pixels = animal()
        case "mixture":
            share = rng.random()
            pixels = share * animal() + (1 - share) * gradient() + rng.random() * noise()
        case "blurred":
            pixels = ndimage.gaussian_filter(animal() + noise(), rng.uniform(0.4, 4), axes=(0, 1))
        case "saturated":
            pixels = 0.5 + rng.uniform(2, 6) * (any_of() - 0.5)
        case "grey":
            pixels = any_of().mean(axis=2, keepdims=True).repeat(3, axis=2)
        case "texture":
            pixels = gradient() + waves() + (noise() if rng.random() < 0.3 else 0)
    return pixels.clip(0, 1).astype(np.float32)


def mixed(seed, num, H, W):
    rng = np.random.default_rng(seed)
    return np.stack([picture(rng, KINDS[i % len(KINDS)], H, W) for i in range(num)])


@pytest.fixture(scope="module")
def pictures():
    return [mixed(seed, num, H, W) for seed, ((H, W), num) in enumerate(SIZES.items())]


@pytest.mark.parametrize("quality", [50, 80, 95])
def test_it_ranks_and_measures_as_pillow_does(pictures, quality):
    true = [jpeg.jpeg_kilobytes(images, quality=quality) for images in pictures]
    ours = [np.asarray(estimate(images, quality=quality)) for images in pictures]
    kinds = np.concatenate([np.arange(len(images)) % len(KINDS) for images in pictures])
    error = np.abs(np.concatenate(ours) / np.concatenate(true) - 1)
    ranks = [stats.spearmanr(a, b).statistic for a, b in zip(ours, true, strict=True)]
    ranks.append(stats.spearmanr(np.concatenate(ours), np.concatenate(true)).statistic)
    by_kind = {
        kind: stats.spearmanr(*(np.concatenate(sizes)[kinds == i] for sizes in (ours, true))).statistic
        for i, kind in enumerate(KINDS)
    }
    print(f"\nquality {quality}: Spearman {dict(zip([*SIZES, 'all'], np.round(ranks, 4).tolist(), strict=True))}")
    print(f"by kind { ({kind: round(float(rank), 4) for kind, rank in by_kind.items()}) }")
    print(f"relative error: median {np.median(error):.4f}, p95 {np.quantile(error, 0.95):.4f}, most {error.max():.4f}")
    assert min(ranks) > 0.995
    assert min(by_kind.values()) > 0.97
    assert np.median(error) < 0.01 and np.quantile(error, 0.95) < 0.04


def test_the_constants_are_what_least_squares_finds(pictures):
    counts, targets = [], []
    for images in pictures:
        for quality in (50, 80, 95):
            count, known = (np.asarray(x) for x in bit_counts(images, quality=quality))
            num_bits = 8000 * jpeg.jpeg_kilobytes(images, quality=quality)
            counts.append(count / num_bits[:, None])
            targets.append((num_bits - 8 * jpeg_estimate.HEADER_BYTES - known) / num_bits)
    refit, *_ = np.linalg.lstsq(np.concatenate(counts), np.concatenate(targets))
    print(refit)
    np.testing.assert_allclose(refit, jpeg_estimate.BITS, rtol=0.03)


def test_dct_is_scipys():
    planes = np.random.default_rng(0).random((2, 3, 16, 24), dtype=np.float32)
    found = jpeg_estimate.dct(jnp.asarray(planes))
    for y, x in np.ndindex(2, 3):
        block = planes[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        np.testing.assert_allclose(found[:, :, y, x], fft.dctn(block, axes=(2, 3), norm="ortho"), atol=2e-6)


@pytest.mark.parametrize("quality", [1, 30, 49, 50, 80, 95, 100])
def test_quantisation_tables_are_pillows(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    for i, table in enumerate(jpeg_estimate.quantisation_tables(quality)):
        np.testing.assert_array_equal(table.ravel(), tables[i])


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_that_is_none_is_refused(quality):
    with pytest.raises(UserError, match=f"quality {quality}: expected 1 to 100"):
        jpeg_estimate.jpeg_kilobytes_estimate(jnp.zeros((1, 8, 8, 3)), quality=quality)


def test_zigzag_turns_at_the_edges():
    assert jpeg_estimate._ZIGZAG[:11].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32]
    assert sorted(jpeg_estimate._ZIGZAG) == list(range(64))


def test_runs_of_certain_coefficients_are_counted():
    present = np.array([0, 0, 1, 1, 0, 1, 0], np.float32)[:, None, None, None]
    np.testing.assert_array_equal(jpeg_estimate.runs(jnp.asarray(present)).ravel(), [0, 1, 2, 0, 0, 1, 0])


def test_a_flat_picture_has_no_cost_but_that_of_empty_blocks():
    flat = np.float32([0, 0.5, 1])[:, None, None, None] * np.ones((1, 64, 64, 3), np.float32)
    np.testing.assert_allclose(estimate(flat), jpeg.jpeg_kilobytes(flat), rtol=0.01)


@pytest.mark.parametrize(("H", "W"), [(1, 1), (8, 8), (17, 40), (7, 23)])
def test_any_size(H, W):
    images = mixed(5, 16, H, W)
    np.testing.assert_allclose(estimate(images), jpeg.jpeg_kilobytes(images), rtol=0.05)


def test_a_batch_is_its_pictures_one_by_one():
    images = mixed(6, 4, 33, 50)
    alone = [estimate(images[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(estimate(images), alone, rtol=1e-6)


def test_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        images = jnp.asarray(mixed(7, 8, 20, 35), jnp.float64)
        gradient = jax.jit(jax.grad(lambda x: jpeg_estimate.jpeg_kilobytes_estimate(x).sum()))(images)
        assert estimate(images).dtype == gradient.dtype == jnp.float64
        np.testing.assert_allclose(estimate(images), estimate(images.astype(jnp.float32)), rtol=1e-5)
        step = 1e-6
        for direction in (rng.normal(size=images.shape), np.eye(1, images[0].size, 500).reshape(images[0].shape)[None]):
            change = estimate(images + step * direction) - estimate(images - step * direction)
            np.testing.assert_allclose(
                (gradient * direction).sum(axis=(1, 2, 3)), change / (2 * step), rtol=1e-3, atol=1e-7
            )


def test_gradients_are_finite_where_nothing_is_to_be_seen():
    noise = np.random.default_rng(8).integers(0, 2, (3, 32, 32, 3))
    levels = np.float32([0, 0.5, 1])[:, None, None, None]
    for images in (levels * np.ones((1, 32, 32, 3), np.float32), noise.astype(np.float32)):
        for quality in (1, 95, 100):
            gradient = jax.grad(lambda x, q=quality: estimate(x, quality=q).sum())(jnp.asarray(images))
            assert np.isfinite(gradient).all()


def test_half_precision_is_computed_in_float32():
    images = jnp.asarray(mixed(9, 4, 33, 50))
    for dtype in (jnp.bfloat16, jnp.float16):
        found = estimate(images.astype(dtype))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, estimate(images.astype(dtype).astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
def test_ascent_changes_the_true_size(sign):
    pure = {-1: jpeg_estimate.pure_compressibility, 1: jpeg_estimate.pure_incompressibility}[sign]
    rng = np.random.default_rng(10)
    amplitude = {-1: 0.1, 1: 0.02}[sign]
    start = np.stack([render(i)[0] / 255 for i in range(4)]) + rng.normal(0, amplitude, (4, 64, 64, 3))
    start = start.clip(0, 1).astype(np.float32)

    @jax.jit
    def ascend(images):
        gradient = jax.grad(lambda x: pure((), x, ()).sum())(images)
        return (images + 0.01 * gradient / jnp.abs(gradient).mean(axis=(1, 2, 3), keepdims=True)).clip(0, 1)

    images = jnp.asarray(start)
    for _ in range(20):
        images = ascend(images)
    before, after = jpeg.jpeg_kilobytes(start), jpeg.jpeg_kilobytes(np.asarray(images))
    print(before, after)
    assert (sign * after > sign * before * (1 + 0.2 * sign)).all()


def test_as_a_reward_on_the_device():
    images = jnp.asarray(mixed(11, 4, 64, 64))
    prompts = Prompts(("",) * 4, np.zeros((4, 2), int), np.arange(4), ({},) * 4)
    reward = rewards.on_device("estimate", jpeg_estimate.pure_compressibility, lambda prompts: ())
    scores = reward.result(reward.submit((), images, prompts))
    assert reward.pure is jpeg_estimate.pure_compressibility
    np.testing.assert_allclose(scores[:, 0], -jpeg.jpeg_kilobytes(np.asarray(images)), rtol=0.05)
    np.testing.assert_allclose(jpeg_estimate.pure_incompressibility((), images, ()), -scores[:, 0], rtol=1e-6)
