"""One optimizer step: the gradient of many (sample, slice) rows, accumulated over micro-batches, then optax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from ddpo_jax.errors import RunStopped
from ddpo_jax.sharding import Layout
from ddpo_jax.types import Algorithm, Finetune, Frozen, Metrics, PyTree, TrainState

MAX_SKIPPED_IN_A_ROW = 5  # gradients that were not finite


class MicroBatch(NamedTuple):
    """Rows of (sample, slice); those with weight 0 only fill the shape up."""

    rows: Int[np.ndarray, "r 2"]
    weight: Float[np.ndarray, " r"]


class Total(NamedTuple):
    """Weighted sums over the rows so far."""

    grads: PyTree
    weight: Float[Array, ""]
    loss: Float[Array, ""]
    mean: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # the sum, and the weight of the rows that it is over
    max: dict[str, Float[Array, ""]]


class Update(NamedTuple):
    """The jitted programs of an update, driven by a Python loop over micro-batches, and how the last is compiled.

    The loop is Python's on purpose: XLA runs a convolution's backward pass inside `scan` or `cond` ten times slower
    on CPU, and on accelerators dispatch runs ahead of the device anyway.
    """

    zero: Callable  # params, frozen, batch, micro_batch, key -> Total of no rows
    accumulate: Callable  # params, frozen, batch, micro_batch, key, total (donated) -> total, Metrics a row
    apply: Callable  # state (donated), total -> state, scalars
    prepare: Callable  # state, total -> wait: compiles `apply` on a thread when first called, which `wait` waits for


def make_update(
    algorithm: Algorithm, tuning: Finetune, tx: optax.GradientTransformation, *, ema_decay: float, layout: Layout
) -> Update:
    """The gradient and optimizer programs of an algorithm. ema_decay 0: state.ema stays None.

    layout: rows are cut over it, their samples fetched from where they are; what is learned stays as the table says.
    """

    def objective(params, frozen, batch, micro_batch, key):
        merged = layout.gather(tuning.merge(frozen.denoiser, params))
        frozen = frozen._replace(denoiser=layout.gather(frozen.denoiser))
        losses, metrics = algorithm.loss(merged, frozen, batch, micro_batch.rows, key)
        return jnp.sum(losses * micro_batch.weight), (losses, metrics)

    def placed(total: Total) -> Total:
        return layout.whole(total._replace(grads=()))._replace(grads=layout.keep(total.grads))

    def accumulate(
        params: PyTree, frozen: Frozen, batch: PyTree, micro_batch: MicroBatch, key: Key[Array, ""], total: Total
    ) -> tuple[Total, Metrics]:
        micro_batch = layout.rows(micro_batch)
        grads, (losses, metrics) = jax.grad(objective, has_aux=True)(params, frozen, batch, micro_batch, key)
        weight = micro_batch.weight
        total = Total(
            grads=jax.tree.map(jnp.add, total.grads, grads),
            weight=total.weight + weight.sum(),
            loss=total.loss + jnp.sum(losses * weight),
            mean={name: add_defined(total.mean[name], x, weight) for name, x in metrics.mean.items()},
            max={
                name: jnp.maximum(total.max[name], jnp.max(jnp.where(weight > 0, x, -jnp.inf)))
                for name, x in metrics.max.items()
            },
        )
        return placed(total), metrics

    def zero(params: PyTree, frozen: Frozen, batch: PyTree, micro_batch: MicroBatch, key: Key[Array, ""]) -> Total:
        _, (_, metrics) = jax.eval_shape(objective, params, frozen, batch, micro_batch, key)
        total = Total(
            grads=jax.tree.map(jnp.zeros_like, params),
            weight=jnp.zeros(()),
            loss=jnp.zeros(()),
            mean={name: (jnp.zeros(()), jnp.zeros(())) for name in metrics.mean},
            # With a dtype: a weakly typed one would compile `accumulate` a second time.
            max={name: jnp.full((), -jnp.inf, jnp.float32) for name in metrics.max},
        )
        return placed(total)

    def apply(state: TrainState, total: Total) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        scale = 1.0 / total.weight  # XLA fuses no division into what uses it: it would be a kernel for each gradient
        grads = jax.tree.map(lambda g: g * scale, total.grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average forgets the start sooner while it is young, as in diffusers' EMAModel and the ADM code.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - decay)
        scalars = {name: value / defined for name, (value, defined) in total.mean.items()}
        scalars |= total.max | {
            "loss": total.loss / total.weight,
            "grad_norm": optax.tree.norm(grads),
            "skipped_in_a_row": opt_state.notfinite_count,
            "skipped_steps": opt_state.total_notfinite,
        }
        params, ema, opt_state = layout.keep((params, ema, opt_state))
        step, scalars = layout.whole((state.step + 1, scalars))
        return state._replace(step=step, params=params, ema=ema, opt_state=opt_state), scalars

    apply = jax.jit(apply, donate_argnums=0)
    return Update(
        # keep_unused: its result is then committed to their device, as that of `accumulate` is; which would be compiled
        # a second time if it were not.
        zero=jax.jit(zero, keep_unused=True),
        accumulate=jax.jit(accumulate, donate_argnums=5),
        apply=apply,
        prepare=compiled_aside(apply),
    )


def compiled_aside(program: Callable) -> Callable:
    """Lets a jitted program be compiled while another one is.

    Gives prepare(*inputs) -> wait. The first call has a thread compile the program for inputs of these shapes in these
    places, which are all that it will have; further calls do nothing. wait() ends once the program is compiled, and
    raises what the compiler did. The program then finds what was compiled where jit keeps it.
    """
    compiling: Future | None = None

    def prepare(*inputs: PyTree) -> Callable[[], Any]:
        nonlocal compiling
        if compiling is None:
            thread = ThreadPoolExecutor(1, "compiler")
            compiling = thread.submit(program.lower(*inputs).compile)
            thread.shutdown(wait=False)
        return compiling.result

    return prepare


def add_defined(
    total: tuple[Float[Array, ""], Float[Array, ""]], values: Float[Array, " r"], weight: Float[Array, " r"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum and the weight with the rows whose value is not NaN."""
    defined = ~jnp.isnan(values)
    return total[0] + jnp.sum(jnp.where(defined, values, 0) * weight), total[1] + jnp.sum(defined * weight)


def plan(
    slices: Bool[np.ndarray, "b s"],
    rng: np.random.Generator,
    *,
    num_updates: int,
    fraction: float,
    micro_batch_size: int,
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each optimizer step of one pass over a batch.

    Samples are shuffled and dealt to the steps whole; of each sample a random `fraction` of its own `slices` is taken,
    at least one, independently. A sample that has none is left out, and so is a step that is left without rows.
    """
    for samples in np.array_split(rng.permutation(slices.shape[0]), num_updates):
        order = rng.permuted(np.tile(np.arange(slices.shape[1]), (len(samples), 1)), axis=1)
        own = slices[samples[:, None], order]
        taken = np.maximum(1, np.round(own.sum(axis=1, keepdims=True) * fraction))
        chosen = own & (own.cumsum(axis=1) <= taken)
        rows = np.stack([np.broadcast_to(samples[:, None], own.shape)[chosen], order[chosen]], axis=1)
        if len(rows):
            yield _cut(rows.astype(np.int32), micro_batch_size)


def _cut(rows: Int[np.ndarray, "n 2"], size: int) -> list[MicroBatch]:
    """Equal micro-batches; the last is filled up with copies of the last row that weigh nothing."""
    filler = -len(rows) % size
    weight = np.concatenate([np.ones(len(rows)), np.zeros(filler)]).astype(np.float32)
    rows = np.concatenate([rows, np.repeat(rows[-1:], filler, axis=0)])
    return [MicroBatch(rows[i : i + size], weight[i : i + size]) for i in range(0, len(rows), size)]


class Schedule(NamedTuple):
    """How a round is learned from."""

    num_updates: int  # optimizer steps a pass
    num_inner_epochs: int  # passes
    timestep_fraction: float  # of a sample's slices, drawn anew in each pass
    micro_batch_size: int  # rows a gradient program, of all shards together


def optimize(
    update: Update,
    algorithm: Algorithm,
    state: TrainState,
    frozen: Frozen,
    batch: PyTree,
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    seed: tuple[int, int],
    phase: Callable,
    check: Callable,
) -> tuple[TrainState, list[dict[str, float | int]]]:
    """The state after a round's updates, and the scalars of each. What `state` has learned is donated.

    `seed` is (run, epoch): who is learned from when depends on nothing else. `check` sees the first update's scalars.

    Raises:
        RunStopped: too many gradients in a row were not finite; the parameters are those before them.
    """
    slices = algorithm.slices(batch)
    passes = [
        list(
            plan(
                slices,
                np.random.default_rng((*seed, 1 + i)),  # (run, epoch) alone draws the prompts
                num_updates=schedule.num_updates,
                fraction=schedule.timestep_fraction,
                micro_batch_size=schedule.micro_batch_size,
            )
        )
        for i in range(schedule.num_inner_epochs)
    ]
    # Only what is learned goes through the program: host arrays in it would compile a second one.
    learned = state._replace(epoch=None, carry=None, key=None)
    if algorithm.recompute:
        micro_batches = _first_seen(passes, schedule.micro_batch_size)
        batch = _recompute(update, algorithm, learned, frozen, batch, micro_batches, key, phase)
    history, unread, before = [], None, None

    def read(scalars: Mapping[str, Float[Array, ""]]) -> None:
        history.append({name: float(value) for name, value in jax.device_get(scalars).items()})
        if len(history) == 1 and not history[0]["skipped_in_a_row"]:
            check(history[0])
        if history[-1]["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise RunStopped(
                f"{MAX_SKIPPED_IN_A_ROW} gradients in a row were not finite; the parameters were left as they were"
                " before them. Lower train.learning_rate, or look at what the reward pushes to"
            )

    with phase("update", sum(len(micro_batches) for one in passes for micro_batches in one)) as advance:
        for i, one in enumerate(passes):
            key_pass = jax.random.fold_in(key, i)
            for micro_batches in one:
                total = update.zero(learned.params, frozen, batch, micro_batches[0], key_pass)
                wait = update.prepare(learned, total)
                for micro_batch in micro_batches:
                    total, metrics = update.accumulate(learned.params, frozen, batch, micro_batch, key_pass, total)
                    jax.block_until_ready(before)  # one program is always under way
                    before = metrics
                    advance(1)
                wait()
                learned, scalars = update.apply(learned, total)
                if unread is not None:
                    read(unread)  # of the step before: the devices have this one's work by now
                unread = scalars
        if unread is not None:
            read(unread)
    return learned._replace(epoch=state.epoch, carry=state.carry, key=state.key), history


def summarize(history: list[dict[str, float | int]], skipped_before: float) -> dict[str, float | int]:
    """One round's scalars: means over the updates that were made; the ratio's deviation is that before the first."""
    if not history:
        return {"skipped_steps": 0.0}
    made = [scalars for scalars in history if not scalars["skipped_in_a_row"]] or history[:1]
    report = {name: mean_of([scalars[name] for scalars in made]) for name in made[0]}
    del report["skipped_in_a_row"]
    report["skipped_steps"] = history[-1]["skipped_steps"] - skipped_before
    if "ratio_max_deviation" in report:
        report["ratio_max_deviation"] = history[0]["ratio_max_deviation"]
    return report


def mean_of(values: list[float | int]) -> float | int:
    """The mean of those that are defined; NaN if none is."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _first_seen(passes: list[list[list[MicroBatch]]], micro_batch_size: int) -> list[MicroBatch]:
    """The micro-batches of the first pass, and all other rows that later passes will come to."""
    first, *later = ([micro_batch for step in one for micro_batch in step] for one in passes)
    seen = {tuple(row) for micro_batch in first for row in micro_batch.rows.tolist()}
    rows = {tuple(row) for one in later for micro_batch in one for row in micro_batch.rows.tolist()} - seen
    return first + (_cut(np.array(sorted(rows), np.int32), micro_batch_size) if rows else [])


def _recompute(
    update: Update,
    algorithm: Algorithm,
    learned: TrainState,
    frozen: Frozen,
    batch: PyTree,
    micro_batches: list[MicroBatch],
    key: Key[Array, ""],
    phase: Callable,
) -> PyTree:
    """The batch after algorithm.recompute has seen each row as the first pass's own program computes it.

    The gradients of that program are thrown away: another program, without them, would round differently.
    """
    seen = []
    with phase("recompute", len(micro_batches)) as advance:
        for micro_batch in micro_batches:
            total = update.zero(learned.params, frozen, batch, micro_batch, key)
            update.prepare(learned, total)
            _, metrics = update.accumulate(learned.params, frozen, batch, micro_batch, key, total)
            jax.block_until_ready(metrics)
            seen.append((micro_batch, metrics))
            advance(1)
    for micro_batch, metrics in seen:
        batch = algorithm.recompute(batch, *micro_batch, metrics)
    return batch
