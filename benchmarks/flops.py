"""FLOPs of a run's work by analysis: products and convolutions of its programs, loops as often as they are run.

They are the model's own: what `train.remat` computes a second time, and rows that only fill up a program, are not
counted, so that a share of a chip's peak (MFU) means the same whatever is kept, and however work is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from benchmarks import hlo, programs
from ddpo_jax.methods import method_of
from ddpo_jax.sharding import make_layout


class Work(NamedTuple):
    """FLOPs of a run."""

    rollout: int  # a picture: text, all denoising steps with guidance, decoding
    row: int  # a (sample, slice) row: forward and backward

    def of_round(self, config: ConfigDict, *, rows_per_sample: float) -> float:
        """A round's, at so many trained timesteps a sample; `recompute`, where a config asks for it, comes on top."""
        learned = method_of(config).learned(config) * config.train.num_inner_epochs * rows_per_sample
        return method_of(config).drawn(config) * self.rollout + learned * self.row


def flops_of(fn: Callable, *inputs) -> int:
    """Of one call of a function that can be traced, at arrays or shapes."""
    return hlo.work(jax.jit(fn).lower(*inputs).compiler_ir("hlo").as_hlo_text()).flops


def ddpo(config: ConfigDict, family: str = "") -> Work:
    """What a config's DDPO costs. family: of a published model; by default the config's own, which is a folder here.

    Raises:
        UserError: the config cannot be used, or its algorithm is another one.
    """
    programs.check_samples(config)
    return work(config, programs.read_model(config, family))


def work(config: ConfigDict, model: tuple) -> Work:
    """What sampling and a config's method cost, on a model as programs.read_model gives it.

    A row of Diffusion-DPO is a pair whose latents are there: forward and backward of two pictures, and the reference's
    forward of each.
    """
    config = config.copy_and_resolve_references()
    config.train.remat = "none"
    config.train.old_log_prob = "stored"
    config.attention = "xla"  # a kernel of cuDNN's is a closed box
    config.convolution = "direct"  # the work is the same by fewer products
    layout = make_layout(devices=jax.devices()[:1])
    run = programs.abstract_run(config, *model, layout=layout, chunk_size=1, micro_batch_size=1)
    rollout, row = (flops_of(program.fn, *program.inputs) for program in (run.sample, run.accumulate))
    return Work(rollout, row)
