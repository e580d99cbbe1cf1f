"""A diffusion model as a stochastic policy: its denoising steps are actions, with densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax import losses, process
from ddpo_jax.errors import UserError
from ddpo_jax.sharding import Layout
from ddpo_jax.types import Frozen, Gaussian, Model, Policy, PyTree, Trajectory


def make_policy(
    model: Model, *, num_steps: int, eta: float, guidance_scale: float, log_prob_reduction: str = "mean"
) -> Policy:
    """The policy of a model sampled in `num_steps` with noise `eta` under classifier-free guidance.

    guidance_scale 1 turns guidance off and halves the work. log_prob_reduction is `mean` (nats a latent element, as
    published) or `sum` (nats a latent).

    Raises:
        UserError: a setting is out of range.
    """
    check_sampling(eta, guidance_scale)
    if log_prob_reduction not in ("mean", "sum"):
        raise UserError(f"sample.log_prob_reduction={log_prob_reduction!r}: expected 'mean' or 'sum'")
    predict = _guidance(model, guidance_scale)
    timesteps = model.process.timesteps(num_steps)

    def after(t: Float[Array, " b"]) -> Float[Array, " b"]:
        return model.process.after(t, num_steps)

    def transition(
        params: PyTree,
        x_t: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        t_next: Float[Array, " b"],
        cond: PyTree,
        uncond: PyTree,
        noisy: Bool[Array, ""] | None = None,
    ) -> Gaussian:
        """p(x_next | x_t), of this policy's eta, or of eta 0 where not `noisy`."""
        prediction = predict(params, x_t, t, cond, uncond)
        p = model.process.transition(prediction, x_t, t, t_next, eta=eta)
        if noisy is None:
            return p
        still = model.process.transition(prediction, x_t, t, t_next, eta=0.0)
        return jax.tree.map(lambda drawn, kept: jnp.where(noisy, drawn, kept), p, still)

    def log_prob(step: Gaussian, x_next: Float[Array, "b h w c"]) -> Float[Array, " b"]:
        return process.log_prob(step, x_next, reduce=log_prob_reduction)

    def kl(p: Gaussian, q: Gaussian) -> Float[Array, " b"]:
        return losses.gaussian_kl(p, q, reduce=log_prob_reduction)

    def noise(i: Int[Array, ""], keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), model.latent_shape))(keys)

    def rollout(
        params: PyTree,
        cond: PyTree,
        uncond: PyTree,
        keys: Key[Array, " b"],
        start_keys: Key[Array, " b"] | None = None,
        noisy: Bool[Array, " T"] | None = None,
    ) -> Trajectory:
        """One trajectory a key; a sample's noise depends on its own keys alone.

        start_keys: of the noise that the first step begins from, where it is another's too; by default `keys`.
        noisy: the steps that are taken with noise; the others are deterministic. By default all are.
        """
        count = keys.shape[0]

        def step(x_t, inputs):
            i, t, t_next, noisy = inputs
            p = transition(params, x_t, jnp.full(count, t), jnp.full(count, t_next), cond, uncond, noisy)
            x_next = process.sample(p, noise(i, keys))
            return x_next, (x_next, log_prob(p, x_next), process.stochastic(p))

        x_first = noise(jnp.int32(0), keys if start_keys is None else start_keys)
        inputs = (jnp.arange(1, num_steps + 1), timesteps[:-1], after(timesteps[:-1]), noisy)
        _, (x, log_probs, trained) = jax.lax.scan(step, x_first, inputs)
        return Trajectory(
            t=jnp.broadcast_to(timesteps, (count, num_steps + 1)),
            x=jnp.moveaxis(jnp.concatenate([x_first[None], x]), 0, 1),
            log_prob=log_probs.T,
            trained=trained.T,
        )

    def final(
        params: PyTree,
        cond: PyTree,
        uncond: PyTree,
        keys: Key[Array, " b"],
        grad_steps: Int[Array, " b"],
        max_grad_steps: int,
    ) -> Float[Array, "b h w c"]:
        """The x_0 of `rollout` with the same keys, through whose last `grad_steps` steps gradients flow.

        Clark et al. 2024 (DRaFT-K); with grad_steps drawn anew each time Prabhudesai et al. 2023 (AlignProp). What was
        before is sampled and no more. A step's inner values are computed again for its gradient.
        """
        count, first = keys.shape[0], num_steps - max_grad_steps

        def step(params: PyTree, x_t: Float[Array, "b h w c"], i: Int[Array, ""]) -> Float[Array, "b h w c"]:
            t = jnp.full(count, timesteps[i])
            p = transition(params, x_t, t, after(t), cond, uncond)
            return process.sample(p, noise(i + 1, keys))

        def learned(x_t: Float[Array, "b h w c"], i: Int[Array, ""]) -> tuple[Float[Array, "b h w c"], None]:
            begun = (i >= num_steps - grad_steps)[:, None, None, None]
            x_t = jnp.where(begun, x_t, jax.lax.stop_gradient(x_t))
            x_next = jax.checkpoint(step)(params, x_t, i)
            return jnp.where(begun, x_next, jax.lax.stop_gradient(x_next)), None

        start = noise(jnp.int32(0), keys)
        still = jax.lax.stop_gradient(params)
        x, _ = jax.lax.scan(lambda x_t, i: (step(still, x_t, i), None), start, jnp.arange(first))
        # XLA runs a convolution's backward pass inside a loop ten times slower on CPU.
        unroll = max_grad_steps if jax.default_backend() == "cpu" else 1
        return jax.lax.scan(learned, jax.lax.stop_gradient(x), jnp.arange(first, num_steps), unroll=unroll)[0]

    def denoising_error(
        params: PyTree,
        x_0: Float[Array, "b h w c"],
        cond: PyTree,
        keys: Key[Array, " b"],
        uncond: PyTree | None = None,
    ) -> Float[Array, " b"]:
        """E‖network(x_t, t) - target‖² a latent element, at one random t and ε a key (Ho et al. 2020, Eq. 14).

        uncond: makes the network's output the guided one, as it is sampled from.
        """
        key_t, key_eps = jax.vmap(jax.random.split, out_axes=1)(keys)
        t = jax.vmap(lambda key: model.process.sample_timesteps(key, 1)[0])(key_t)
        eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(key_eps)
        x_t = model.process.add_noise(x_0, eps, t)
        out = model.predict(params, x_t, t, cond) if uncond is None else predict(params, x_t, t, cond, uncond)
        return losses.denoising_mse(out, model.process.target(x_0, eps, t))

    return Policy(rollout, final, after, transition, log_prob, kl, denoising_error)


def check_sampling(eta: float, guidance_scale: float) -> None:
    """Raises UserError if a setting of the sampler is out of range, NaN too."""
    if not 0 <= eta <= 1:
        raise UserError(f"sample.eta={eta}: expected 0 (deterministic) to 1, the published value")
    if not 1 <= guidance_scale < math.inf:
        raise UserError(
            f"sample.guidance_scale={guidance_scale}: expected 1 (no guidance) or more; 5 is the published value"
        )


def make_sampler(
    model: Model, policy: Policy, merge: Callable, *, layout: Layout, decode_chunk_size: int = 0
) -> Callable:
    """One jitted program: trainable, frozen, tokens (b, s), keys (b,), start_keys (b,), noisy (T,) -> what it made.

    That is cond, Trajectory and images (b, H, W, 3). The last two inputs are as in `rollout`, and may be None.

    merge: as in Finetune. It is done inside, so that no merged copy of the denoiser outlives the call.
    layout: what is made is cut over the batch.
    decode_chunk_size: pictures that a device decodes at a time; 0 is all of them.
    """

    def decode(vae: PyTree, x_0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        if not 0 < decode_chunk_size * layout.num_shards < len(x_0):
            return model.decode(vae, x_0)

        def in_chunks(vae: PyTree, x_0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
            return jax.lax.map(lambda one: model.decode(vae, one[None])[0], x_0, batch_size=decode_chunk_size)

        return layout.each_shard(in_chunks)(vae, x_0)

    def sample(
        trainable: PyTree,
        frozen: Frozen,
        tokens: Int[Array, "b s"],
        keys: Key[Array, " b"],
        start_keys: Key[Array, " b"] | None = None,
        noisy: Bool[Array, " T"] | None = None,
    ) -> tuple[PyTree, Trajectory, Float[Array, "b H W 3"]]:
        tokens, keys, start_keys = layout.rows((tokens, keys, start_keys))
        cond = layout.rows(model.encode_text(layout.gather(frozen.text), tokens))
        denoiser = layout.gather(merge(frozen.denoiser, trainable))
        trajectory = layout.rows(policy.rollout(denoiser, cond, frozen.uncond, keys, start_keys, noisy))
        return cond, trajectory, layout.rows(decode(layout.gather(frozen.vae), trajectory.x[:, -1]))

    return jax.jit(sample)


def sample_keys(key: Key[Array, ""], index: Int[np.ndarray, " b"], *, group_size: int = 1) -> Key[Array, " b"]:
    """The keys of the samples with these numbers: functions of the number alone, whatever the chunk or device.

    group_size: so many samples in a row have one key, that of the first of them.
    """
    return _fold_in(key, index // group_size * group_size)


@jax.jit
def _fold_in(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index)


def _guidance(model: Model, scale: float) -> Callable:
    """The network with guidance, u + w (c - u) (Ho & Salimans 2022, Eq. 6), in one pass; or without."""

    def both(params, x_t, t, conds):
        def twice(u, c):
            return jnp.concatenate([jnp.broadcast_to(u, c.shape), c])

        out = model.predict(params, twice(x_t, x_t), twice(t, t), jax.tree.map(twice, *conds))
        return jnp.split(out, 2)

    def guided(params, x_t, t, cond, uncond):
        without, with_text = (model.predict_each or both)(params, x_t, t, (uncond, cond))
        return without + scale * (with_text - without)

    def plain(params, x_t, t, cond, uncond):
        return model.predict(params, x_t, t, cond)

    return plain if scale == 1 else guided
