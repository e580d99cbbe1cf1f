"""The types that join the parts: NamedTuples of arrays, and NamedTuples of pure functions. No logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt

PyTree = Any


class Gaussian(NamedTuple):
    """p(x_next | x_t). The rollout samples it, the loss scores it; std is 0 where the transition is deterministic."""

    mean: Float[Array, "b h w c"]
    std: Float[Array, "b 1 1 1"]


class Process(NamedTuple):
    """A noise process; no network inside."""

    timesteps: Callable  # num_steps -> (T+1,) float32, from pure noise to clean
    after: Callable  # t, num_steps -> t_next, where a step from t ends
    add_noise: Callable  # x_0, eps, t (b,) -> x_t
    target: Callable  # x_0, eps, t (b,) -> what the network regresses on
    transition: Callable  # prediction, x_t, t (b,), t_next (b,), *, eta -> Gaussian
    sample_timesteps: Callable  # key, b -> (b,) float32, the training distribution of t


class Condition(NamedTuple):
    """What the denoiser knows of the picture beside the latent."""

    context: Float[Array, "b s d"]  # attended to
    pooled: Float[Array, "b p"] | None = None  # these two are added to the time embedding in Stable Diffusion XL
    time_ids: Float[Array, "b 6"] | None = None  # pixels: original height, width; crop top, left; target height, width


class Posterior(NamedTuple):
    """q(latent | picture), a diagonal Gaussian over latents as the autoencoder has them, before they are scaled."""

    mean: Float[Any, "... h w c"]
    log_variance: Float[Any, "... h w c"]


class Model(NamedTuple):
    """Pure functions of a checkpoint; parameters are always passed in."""

    encode_text: Callable  # text params, tokens (b, s) -> cond, a pytree of (b, ...) arrays
    encode_empty: Callable  # text params, tokens of the empty prompt (1, s) -> the cond that guidance leads away from
    predict: Callable  # denoiser params, x_t, t (b,), cond -> (b, h, w, c) float32
    encode: Callable  # vae params, images (b, H, W, 3) in [0, 1] -> Posterior, float32
    sample_latent: Callable  # Posterior, keys (b,) -> x_0
    decode: Callable  # vae params, x_0 -> images (b, H, W, 3) float32 in [0, 1]
    process: Process
    latent_shape: tuple[int, int, int]
    # denoiser params, x_t, t (b,), conds of b rows or, but not all, 1 -> what `predict` gives with each of them.
    # None: `predict` does, in one batch.
    predict_each: Callable | None = None


class Policy(NamedTuple):
    """A model, a process and guidance, seen as a stochastic policy over denoising steps."""

    rollout: Callable  # params, cond, uncond, keys (b,), start_keys (b,) or None, noisy (T,) or None -> Trajectory
    final: Callable  # params, cond, uncond, keys (b,), grad_steps (b,), max_grad_steps -> x_0, differentiable
    after: Callable  # t -> t_next
    transition: Callable  # params, x_t, t, t_next, cond, uncond -> Gaussian
    log_prob: Callable  # Gaussian, x_next -> (b,)
    kl: Callable  # Gaussian, Gaussian -> (b,), in the units of log_prob
    denoising_error: Callable  # params, x_0, cond, keys (b,), uncond or None (unguided) -> (b,)


class Trajectory(NamedTuple):
    """T+1 states and the T transitions between them; x[:, 0] is noise and x[:, -1] is x_0."""

    t: Float[Array, "b T+1"]
    x: Float[Array, "b T+1 h w c"]
    log_prob: Float[Array, "b T"]  # nats; per latent element by default; 0 where not trained
    trained: Bool[Array, "b T"]  # False where the transition is deterministic, as outside of a window


class Prompts(NamedTuple):
    """A batch of prompts, as host data."""

    texts: tuple[str, ...]
    tokens: Int[Any, "b s"]
    id: Int[Any, " b"]  # position in the prompt list; per-prompt statistics are kept under it
    metadata: tuple[Mapping[str, Any], ...]  # whatever the prompt source knows, such as questions and answers


class Recalled(NamedTuple):
    """A round's pictures, n a sample, as what the autoencoder made of them before.

    Pictures are numbered one sample after another, from 0 to below b n.
    """

    posterior: Posterior  # numpy, (b, n, h, w, c); to be filled in where one is missing
    missing: Int[Any, " m"]  # numbers of the pictures that are yet to be encoded
    images: Callable  # numbers of pictures -> (m, H, W, 3) uint8
    keep: Callable  # numbers of pictures, their Posterior -> None


class Reward(NamedTuple):
    """One or more experts. NaN means missing."""

    names: tuple[str, ...]
    submit: Callable  # reward params, images (b, H, W, 3) float in [0, 1] or uint8, Prompts -> pending
    result: Callable  # pending -> (b, experts) float32 numpy; NaN too where another process has the picture
    pure: Callable | None  # reward params, images, inputs -> (b,), differentiable; None for a host reward
    why: Callable | None = None  # pending, after its result -> why scores are missing; empty where nothing is known
    prepare: Callable | None = None  # Prompts -> the inputs of pure, an array tree


class Finetune(NamedTuple):
    """What is trained: the whole denoiser, or a small tree merged into it."""

    init: Callable  # key, pretrained -> trainable
    merge: Callable  # pretrained, trainable -> denoiser params
    reads_pretrained: bool  # whether merge does
    changes: Callable  # path/of/a/parameter -> whether training may change it
    adapters: Callable  # trainable -> {path/of/a/kernel: (A, B)}, whose products are added; empty if there are none


class Metrics(NamedTuple):
    """Per-row diagnostics of a loss, reported as their mean or as their maximum over the rows."""

    mean: Mapping[str, Float[Array, " r"]]  # NaN where undefined for a row, which then counts for nothing
    max: Mapping[str, Float[Array, " r"]]


class Algorithm(NamedTuple):
    """A training method."""

    init: Callable  # trainable -> carry, an array pytree that is checkpointed
    collect: Callable  # trainable, frozen, inputs of the round, carry, key -> batch, carry, report   (on the host)
    loss: Callable  # params, frozen, batch, rows, key -> (r,) losses, Metrics   (pure)
    slices: Callable  # batch -> (b, s) bool numpy: what there is to learn from
    recompute: Callable | None  # batch, rows, weight, Metrics -> batch, before the first update; None: not wanted
    check: Callable  # scalars of a run's very first update -> None; raises if the run cannot be right
    stop: Callable  # scalars of a round -> why the run should end here, or None
    reads_reference: bool  # whether loss reads frozen.denoiser


class Frozen(NamedTuple):
    """What is never updated and never checkpointed; `denoiser` is the reference policy."""

    text: PyTree
    denoiser: PyTree  # None where nothing reads it
    vae: PyTree
    uncond: PyTree  # cond of the empty prompt, with a leading axis of 1
    reward: PyTree


class TrainState(NamedTuple):
    """Exactly what a resume needs. Rounds (epochs) are the only resume points."""

    epoch: Int[Any, ""]
    step: Int[Any, ""]
    params: PyTree
    ema: PyTree | None
    opt_state: PyTree
    carry: PyTree
    key: UInt[Any, "..."]  # jax.random.key_data
