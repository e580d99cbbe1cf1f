"""Diffusion-DPO beside torch: the losses on the same errors, and the whole loss and gradient of a small UNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpo_jax import losses
from ddpo_jax.losses import PairErrors

ROWS, SHAPE = 6, (4, 8, 8)


def arrays(seed):
    rng = np.random.default_rng(seed)
    target, base = rng.normal(size=(2, 2 * ROWS, *SHAPE)).astype(np.float32)
    return target, base, (base + 0.02 * rng.normal(size=base.shape)).astype(np.float32)


def torch_loss(out, reference, target, beta):
    """As the authors' train.py has it: winners first, losers second, means over all but the batch."""
    errors = (out - target).pow(2).mean(dim=[1, 2, 3])
    difference = errors.chunk(2)[0] - errors.chunk(2)[1]
    with torch.no_grad():
        own = (reference - target).pow(2).mean(dim=[1, 2, 3])
        reference_difference = own.chunk(2)[0] - own.chunk(2)[1]
    inside = -0.5 * beta * (difference - reference_difference)
    return -F.logsigmoid(inside).mean(), (inside > 0).float().mean()


def ours(out, reference, target, beta):
    def nhwc(x):
        return jnp.moveaxis(jnp.asarray(x), 1, -1)

    errors = [losses.denoising_mse(nhwc(x), nhwc(target)) for x in (out, reference)]
    pair = PairErrors(errors[0][:ROWS], errors[0][ROWS:], errors[1][:ROWS], errors[1][ROWS:])
    rows, metrics = losses.diffusion_dpo(pair, jnp.ones(ROWS), beta=beta)
    return rows.mean(), metrics.mean["implicit_accuracy"].mean()


@pytest.mark.parametrize("beta", [100.0, 2000.0, 5000.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_accuracy_and_gradient_equal_torch(seed, beta):
    """In float64: β times a difference of means says more of how float32 sums than of the loss."""
    target, reference, out = (array.astype(np.float64) for array in arrays(seed))
    leaf = torch.tensor(out, requires_grad=True)
    expected, accuracy = torch_loss(leaf, torch.tensor(reference), torch.tensor(target), beta)
    expected.backward()
    with jax.enable_x64(True):
        (found, found_accuracy), gradient = jax.value_and_grad(ours, has_aux=True)(out, reference, target, beta)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert float(found_accuracy) == pytest.approx(float(accuracy))
    scale = float(leaf.grad.abs().max())
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-9 * scale)


@pytest.mark.parametrize("beta", [100.0, 2000.0, 5000.0])
def test_float32_is_as_good_as_torch_s(beta):
    target, reference, out = arrays(3)
    exact = float(torch_loss(*(torch.tensor(array.astype(np.float64)) for array in (out, reference, target)), beta)[0])
    theirs = float(torch_loss(*map(torch.tensor, (out, reference, target)), beta)[0])
    found = float(ours(out, reference, target, beta)[0])
    assert abs(found - exact) < 1e-5 * exact + 3 * abs(theirs - exact)


def test_at_the_reference_the_loss_is_log_2_and_no_accuracy_is_told():
    target, reference, _ = arrays(2)
    loss, accuracy = ours(reference, reference, target, 5000.0)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6) and np.isnan(accuracy)
