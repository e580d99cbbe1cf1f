"""How the networks compute what costs most: what suits the machine, chosen once."""

from __future__ import annotations

from typing import NamedTuple

from jax.typing import DTypeLike

from ddpo_jax.models import winograd
from ddpo_jax.models.attention import choose_kernel


class Kernels(NamedTuple):
    attention: str = "xla"  # the denoiser's, one of attention.KERNELS
    convolution: str = "direct"  # the denoiser's and the VAE's of 3x3 pixels, one of winograd.METHODS


def choose_kernels(attention: str, convolution: str, *, dtype: DTypeLike) -> Kernels:
    """Those of these names, or for "auto" the best that this machine and dtype have.

    Raises:
        UserError: there is none of that name, or it cannot be had here.
    """
    return Kernels(choose_kernel(attention, dtype=dtype), winograd.choose_method(convolution))
