"""What is trained: all of the denoiser, or low-rank adapters merged into it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ddpo_jax.convert import leaf_path
from ddpo_jax.errors import UserError
from ddpo_jax.types import Finetune, PyTree

ATTENTION = r"attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$"


def full() -> Finetune:
    """Every parameter of the denoiser."""

    def init(key: Key[Array, ""], pretrained: PyTree) -> PyTree:
        # A copy: the training state is donated, and must not take the reference policy with it.
        return jax.tree.map(jnp.array, pretrained)

    def merge(pretrained: PyTree | None, trainable: PyTree) -> PyTree:
        return trainable

    return Finetune(init, merge, reads_pretrained=False, changes=lambda path: True, adapters=lambda trainable: {})


def lora(*, rank: int, alpha: float, targets: str = ATTENTION) -> Finetune:
    """W + (α / r) A B on every kernel whose path matches `targets` (Hu et al. 2022, Eq. 3); A, B in float32.

    A is drawn with standard deviation 1/r and B is 0, as in ddpo-pytorch, so that training starts at the checkpoint. Of
    a convolution A is one of the same size to r channels and B one of 1x1 from them, as in PEFT.

    The kernels that change are best kept in float32: a sum in bfloat16 loses most of a small A B.

    Raises:
        UserError: rank is not positive, `targets` is not a pattern, nothing matches, or what matches is no kernel.
    """
    if rank < 1:
        raise UserError(f"train.lora_rank={rank}: expected 1 or more")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f"train.lora_targets={targets!r}: not a regular expression ({error})") from None

    def init(key: Key[Array, ""], pretrained: PyTree) -> PyTree:
        factors = {}
        for path, kernel in jax.tree_util.tree_leaves_with_path(pretrained):
            name = "/".join(leaf_path(path))
            if not pattern.search(name):
                continue
            if kernel.ndim not in (2, 4):
                raise UserError(f"train.lora_targets: {name} has shape {kernel.shape}; expected kernels only")
            *rows, columns = kernel.shape
            key_a = jax.random.fold_in(key, len(factors))
            factors[name] = {"A": jax.random.normal(key_a, (*rows, rank)) / rank, "B": jnp.zeros((rank, columns))}
        if not factors:
            raise UserError(f"train.lora_targets={targets!r} matches no kernel of the denoiser")
        return factors

    def merge(pretrained: PyTree, trainable: PyTree) -> PyTree:
        known = {"/".join(leaf_path(path)) for path, _ in jax.tree_util.tree_leaves_with_path(pretrained)}
        if trainable.keys() - known:
            raise UserError(f"the adapters are of another denoiser: it has no {min(trainable.keys() - known)}")

        def add(path, kernel):
            factor = trainable.get("/".join(leaf_path(path)))
            return kernel if factor is None else kernel + (alpha / rank) * jnp.tensordot(factor["A"], factor["B"], 1)

        return jax.tree_util.tree_map_with_path(add, pretrained)

    def adapters(trainable: PyTree) -> dict[str, tuple]:
        return {name: (factor["A"], (alpha / rank) * factor["B"]) for name, factor in trainable.items()}

    def changes(path: str) -> bool:
        return bool(pattern.search(path))

    return Finetune(init, merge, reads_pretrained=True, changes=changes, adapters=adapters)
