"""The two kinds of reward: functions that JAX traces, and any Python function on the host.

Two rules hold for both. A picture with a non-finite pixel is missing (NaN) before any scorer sees it: a NaN picture
makes an excellent JPEG. A non-finite score, infinity too, is missing as well.

Each process scores what its own devices hold of the pictures, and leaves the scores of the others NaN.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.rewards.pixels import PixelBatch, as_pixels, check_range, on_the_host
from ddpo_jax.sharding import local_rows
from ddpo_jax.types import Prompts, PyTree, Reward


class Scores(NamedTuple):
    """What a scorer on the host may return instead of bare numbers, where some are missing."""

    values: Any  # (b,) numbers, NaN where there is none
    why: str  # of the last that is missing, for people; empty if none is


def on_device(name: str, pure: Callable, prepare: Callable[[Prompts], PyTree]) -> Reward:
    """A reward that JAX can trace: pure(params, images, inputs) -> (b,), with inputs = prepare(prompts), an array tree.

    `submit` only dispatches, but on one CPU device, where it waits. `pure` stays in the Reward as it was given, to be
    differentiated; it then sees pictures as they come. When it is scored, a non-finite picture is a black one to it,
    and its score is dropped.

    Raises: UserError from `submit` if `pure` returns another shape, from `result` if pixels are outside [0, 1].
    """

    @jax.jit
    def score(
        params: PyTree, images: PixelBatch, inputs: PyTree
    ) -> tuple[Float[Array, " b"], Float[Array, ""], Float[Array, ""]]:
        images = as_pixels(images)
        present = jnp.isfinite(images).all(axis=(1, 2, 3))
        shown = jnp.where(present[:, None, None, None], images, 0)
        scores = jnp.asarray(pure(params, shown, inputs), jnp.float32)
        if scores.shape != present.shape:
            raise UserError(
                f"reward {name} must return shape {present.shape}, one number a picture, not {scores.shape}"
            )
        return jnp.where(present, scores, jnp.nan), shown.min(), shown.max()

    def failed(error: Exception) -> RunStopped:
        return RunStopped(f"reward {name} failed on the device ({type(error).__name__}: {error})")

    def submit(params: PyTree, images: PixelBatch, prompts: Prompts) -> PyTree:
        try:
            return score(params, images, prepare(prompts))
        except UserError:
            raise
        except jax.errors.JaxRuntimeError as error:
            raise failed(error) from error
        except Exception as error:
            raise RunStopped(f"reward {name} raised {type(error).__name__} while traced: {error}") from error

    def result(pending: PyTree) -> Float32[np.ndarray, "b 1"]:
        scores, *bounds = pending
        try:
            rows, own = local_rows(scores)
            lowest, highest = map(float, bounds)
        except Exception as error:
            raise failed(error) from error
        check_range(f"reward {name}", lowest, highest)
        return _spread(_finite_or_missing(own), rows, len(scores))[:, None]

    return Reward(names=(name,), submit=submit, result=result, pure=pure, prepare=prepare)


def texts(prompts: Prompts) -> tuple[str, ...]:
    """What most scorers want to know of the prompts."""
    return prompts.texts


def nothing(prompts: Prompts) -> tuple[()]:
    """For those that look at the pictures alone."""
    return ()


def on_host(
    name: str, fn: Callable, *, deadline: float, num_workers: int, prepare: Callable[[Prompts], Any] = texts
) -> Reward:
    """A reward of any Python function: fn(images, prepare(prompts)) -> (b,), with images numpy float32 in [0, 1].

    fn runs on at most `num_workers` threads, a batch a call, in the order of submission; the copy from the device is
    made there too, so `submit` blocks on nothing. fn sees only the pictures without a non-finite pixel, with their
    prompts, and is not called if there are none. The pictures are a copy that fn may write to. It returns the numbers,
    or Scores, which say why some are missing.

    deadline: seconds that `result` waits once the pictures are ready on the device, so that a long rollout does not
    count. Calls begin in order: when results are taken in that order too, a fn that hangs stops the run within the
    deadline, and a slow one gets all of it for each batch. A hanging thread is abandoned, and lets Python exit.

    Raises: UserError if deadline or num_workers is not positive. From `result`: RunStopped if the deadline passes, or
    from what fn raised; UserError if fn returns anything but (b,) numbers, or if pixels are outside [0, 1].
    """
    if not deadline > 0 or num_workers < 1:
        raise UserError(f"reward {name}: deadline {deadline} and num_workers {num_workers} must be above 0")
    start = _make_workers(num_workers)

    def score(images: PixelBatch, prompts: Prompts) -> Scores:
        rows, pixels = local_rows(images)
        present = np.isfinite(pixels).all(axis=(1, 2, 3))
        rows, shown = rows[present], pixels[present]
        if not len(rows):
            return Scores(np.full(len(images), np.nan, np.float32), "")
        scores = _call(name, fn, on_the_host(name, shown), prepare, take(prompts, rows))
        return scores._replace(values=_spread(scores.values, rows, len(images)))

    def submit(params: PyTree, images: PixelBatch, prompts: Prompts) -> tuple[Any, Future]:
        return images, start(lambda: score(images, prompts))

    def result(pending: tuple[Any, Future]) -> Float32[np.ndarray, "b 1"]:
        images, scores = pending
        jax.block_until_ready(images)
        try:
            return scores.result(timeout=deadline).values[:, None]
        except TimeoutError:
            raise RunStopped(
                f"reward {name} gave no scores within {deadline:g} s. If the scorer is only slow, raise "
                "reward.deadline; if it hangs, look at what it waits for."
            ) from None

    def why(pending: tuple[Any, Future]) -> str:
        _, scores = pending
        return scores.result().why if scores.done() else ""

    return Reward(names=(name,), submit=submit, result=result, pure=None, why=why)


def _make_workers(num_workers: int) -> Callable[[Callable[[], Any]], Future]:
    """A function that starts a job on a daemon thread and returns its Future.

    Not a ThreadPoolExecutor: Python waits for the threads of one at exit, and so for ever if a job hangs.
    """
    jobs: SimpleQueue = SimpleQueue()
    free = threading.Semaphore(num_workers)

    def run_next() -> None:
        # The oldest job, not this thread's own: semaphores do not promise whom they wake, and jobs are to run in order.
        with free:
            job, future = jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

    def start(job: Callable[[], Any]) -> Future:
        future: Future = Future()
        jobs.put((job, future))
        threading.Thread(target=run_next, name="reward", daemon=True).start()
        return future

    return start


def _call(
    name: str, fn: Callable, images: Float32[np.ndarray, "b H W 3"], prepare: Callable, prompts: Prompts
) -> Scores:
    try:
        found = fn(images, prepare(prompts))
        values, reason = found if isinstance(found, Scores) else (found, "")
        scores = np.asarray(values)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise RunStopped(f"reward {name} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(images),) or scores.dtype.kind not in "fiub":
        raise UserError(
            f"reward {name} must return shape ({len(images)},), one number a picture, "
            f"not shape {scores.shape} of {scores.dtype}"
        )
    return Scores(_finite_or_missing(scores), str(reason))


def take(prompts: Prompts, indices: Int[np.ndarray, " n"]) -> Prompts:
    """The prompts at these positions of the batch."""
    return Prompts(
        texts=tuple(prompts.texts[i] for i in indices),
        tokens=np.asarray(prompts.tokens)[indices],
        id=np.asarray(prompts.id)[indices],
        metadata=tuple(prompts.metadata[i] for i in indices),
    )


def _spread(scores: Float32[np.ndarray, " n"], rows: Int[np.ndarray, " n"], count: int) -> Float32[np.ndarray, " b"]:
    """The scores of these rows of a batch of `count`, NaN elsewhere."""
    everyone = np.full(count, np.nan, np.float32)
    everyone[rows] = scores
    return everyone


def _finite_or_missing(scores: np.ndarray) -> Float32[np.ndarray, " b"]:
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and so missing
        scores = scores.astype(np.float32)
    return np.where(np.isfinite(scores), scores, np.float32(np.nan))
