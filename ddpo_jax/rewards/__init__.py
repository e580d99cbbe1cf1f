"""Rewards: pictures and prompts -> scores, on the device or on the host, one expert or several.

Two rules hold for every kind. A picture with a non-finite pixel is missing (NaN) before any scorer sees it: a NaN
picture makes an excellent JPEG. A non-finite score, infinity too, is missing as well. Pixels are float in [0, 1].

Each process scores what its own devices hold of the pictures, and leaves the scores of the others NaN.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.plugins import load_object
from ddpo_jax.rewards import clip_score, jpeg
from ddpo_jax.sharding import first_device, local_rows
from ddpo_jax.types import Prompts, PyTree, Reward

# Decoders clip to [0, 1]; this much is rounding, while pictures in [-1, 1] or [0, 255] are far outside it.
_PIXEL_TOLERANCE = 1e-3


class Settings(NamedTuple):
    """What scorers are made with: the fields of the config's `reward` that they read."""

    deadline: float  # these two as in `on_host`
    num_workers: int
    clip_model: str = ""
    clip_template: str = "{}"


# Scorers on the host, without parameters: images (b, H, W, 3), texts -> (b,)
HOST = {
    "jpeg_compressibility": jpeg.jpeg_compressibility,
    "jpeg_incompressibility": jpeg.jpeg_incompressibility,
}

# Scorers that JAX traces, by what makes them: settings, place -> (pure, prepare, params), as `on_device` reads them
DEVICE = {
    "clip_score": lambda settings, place: clip_score.make(settings.clip_model, settings.clip_template, place=place),
}


def make(names: str, settings: Settings, *, place: Callable = first_device) -> tuple[Reward, tuple[PyTree, ...]]:
    """The reward that the config names, and its parameters for `Frozen.reward`, one tree an expert.

    names: one name or several with commas between, each
      - a name in one of the tables above, such as "jpeg_compressibility";
      - "module:function", a scorer of yours on the host: fn(images, prompts) -> (b,), with images a float32 numpy
        array (b, H, W, 3) in [0, 1] and prompts a tuple of b strings; it runs on threads, so it may be slow;
      - "device:module:function", one that JAX can trace: fn(images) -> (b,). Only such a one has a gradient.

    place: as in read_weights, of their parameters.

    Raises: UserError for a name that is none of these, for one given twice, and for a model that cannot be loaded.
    """
    experts = [_make_expert(name.strip(), settings, place) for name in names.split(",")]
    return join([reward for reward, _ in experts]), tuple(params for _, params in experts)


def on_device(name: str, pure: Callable, prepare: Callable[[Prompts], PyTree]) -> Reward:
    """A reward that JAX can trace: pure(params, images, inputs) -> (b,), with inputs = prepare(prompts), an array tree.

    `submit` only dispatches. `pure` stays in the Reward as it was given, to be differentiated; it then sees pictures
    as they come. When it is scored, a non-finite picture is a black one to it, and its score is dropped.

    Raises: UserError from `submit` if `pure` returns another shape, from `result` if pixels are outside [0, 1].
    """

    @jax.jit
    def score(
        params: PyTree, images: Float[Array, "b H W 3"], inputs: PyTree
    ) -> tuple[Float[Array, " b"], Float[Array, ""], Float[Array, ""]]:
        present = jnp.isfinite(images).all(axis=(1, 2, 3))
        shown = jnp.where(present[:, None, None, None], images, 0)
        scores = jnp.asarray(pure(params, shown, inputs), jnp.float32)
        if scores.shape != present.shape:
            raise UserError(
                f"reward {name} must return shape {present.shape}, one number a picture, not {scores.shape}"
            )
        return jnp.where(present, scores, jnp.nan), shown.min(), shown.max()

    def submit(params: PyTree, images: Float[Any, "b H W 3"], prompts: Prompts) -> PyTree:
        try:
            return score(params, images, prepare(prompts))
        except UserError:
            raise
        except Exception as error:
            raise RunStopped(f"reward {name} raised {type(error).__name__} while traced: {error}") from error

    def result(pending: PyTree) -> Float32[np.ndarray, "b 1"]:
        scores, *bounds = pending
        try:
            rows, own = local_rows(scores)
            lowest, highest = map(float, bounds)
        except Exception as error:
            raise RunStopped(f"reward {name} failed on the device ({type(error).__name__}: {error})") from error
        _check_pixels(name, lowest, highest)
        return _spread(_finite_or_missing(own), rows, len(scores))[:, None]

    return Reward(names=(name,), submit=submit, result=result, pure=pure)


def texts(prompts: Prompts) -> tuple[str, ...]:
    """What most scorers want to know of the prompts."""
    return prompts.texts


def on_host(
    name: str, fn: Callable, *, deadline: float, num_workers: int, prepare: Callable[[Prompts], Any] = texts
) -> Reward:
    """A reward of any Python function: fn(images, prepare(prompts)) -> (b,), with images numpy float32 in [0, 1].

    fn runs on at most `num_workers` threads, a batch a call, in the order of submission; the copy from the device is
    made there too, so `submit` blocks on nothing. fn sees only the pictures without a non-finite pixel, with their
    prompts, and is not called if there are none. The pictures are a copy that fn may write to.

    deadline: seconds that `result` waits once the pictures are ready on the device, so that a long rollout does not
    count. Calls begin in order: when results are taken in that order too, a fn that hangs stops the run within the
    deadline, and a slow one gets all of it for each batch. A hanging thread is abandoned, and lets Python exit.

    Raises: UserError if deadline or num_workers is not positive. From `result`: RunStopped if the deadline passes, or
    from what fn raised; UserError if fn returns anything but (b,) numbers, or if pixels are outside [0, 1].
    """
    if deadline <= 0 or num_workers < 1:
        raise UserError(f"reward {name}: deadline {deadline} and num_workers {num_workers} must be above 0")
    start = _make_workers(num_workers)

    def score(images: Float[Any, "b H W 3"], prompts: Prompts) -> Float32[np.ndarray, " b"]:
        rows, pixels = local_rows(images)
        present = np.isfinite(pixels).all(axis=(1, 2, 3))
        rows, shown = rows[present], pixels[present].astype(np.float32)
        if not len(rows):
            return np.full(len(images), np.nan, np.float32)
        _check_pixels(name, float(shown.min()), float(shown.max()))
        return _spread(_call(name, fn, shown, prepare, take(prompts, rows)), rows, len(images))

    def submit(params: PyTree, images: Float[Any, "b H W 3"], prompts: Prompts) -> tuple[Any, Future]:
        return images, start(lambda: score(images, prompts))

    def result(pending: tuple[Any, Future]) -> Float32[np.ndarray, "b 1"]:
        images, scores = pending
        jax.block_until_ready(images)
        try:
            return scores.result(timeout=deadline)[:, None]
        except TimeoutError:
            raise RunStopped(
                f"reward {name} gave no scores within {deadline:g} s. If the scorer is only slow, raise "
                "reward.deadline; if it hangs, look at what it waits for."
            ) from None

    return Reward(names=(name,), submit=submit, result=result, pure=None)


def join(rewards: Sequence[Reward]) -> Reward:
    """Several experts as one reward, a column each. Its params are a tuple, one tree an expert, even if there is one.

    All experts have the pictures before the first result is waited for. `pure` is there for a single expert only:
    how several count together is for advantages.combine to say.

    Raises: UserError if there is no reward or a name comes twice.
    """
    names = tuple(name for reward in rewards for name in reward.names)
    if not names or len(set(names)) < len(names):
        raise UserError(f"reward.name must give one reward or several different ones, not {', '.join(names) or 'none'}")

    def submit(params: tuple[PyTree, ...], images: Float[Any, "b H W 3"], prompts: Prompts) -> list[PyTree]:
        return [reward.submit(own, images, prompts) for reward, own in zip(rewards, params, strict=True)]

    def result(pending: list[PyTree]) -> Float32[np.ndarray, "b experts"]:
        return np.concatenate([reward.result(own) for reward, own in zip(rewards, pending, strict=True)], axis=1)

    def pure(params: tuple[PyTree, ...], images: Float[Array, "b H W 3"], inputs: PyTree) -> Float[Array, " b"]:
        return rewards[0].pure(params[0], images, inputs)

    single = len(rewards) == 1 and rewards[0].pure is not None
    return Reward(names=names, submit=submit, result=result, pure=pure if single else None)


def shuffled(scores: Float32[np.ndarray, "b experts"], key: Key[Any, ""]) -> Float32[np.ndarray, "b experts"]:
    """The same scores dealt out anew among the pictures: a control, from which nothing can be learned.

    A picture without any score keeps none; what one expert lacks is dealt out with the rest. The order follows from
    `key`.
    """
    scores, rng = scores.copy(), np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    present = np.isfinite(scores).any(axis=1)
    scores[present] = rng.permutation(scores[present])
    return scores


def probe(reward: Reward, params: tuple[PyTree, ...], prompts: Prompts, *, resolution: int) -> None:
    """Scores grey pictures for these prompts, so that a reward that cannot work says so before any work is done.

    Raises: what `result` raises.
    """
    images = jnp.full((len(prompts.texts), resolution, resolution, 3), 0.5, jnp.float32)
    reward.result(reward.submit(params, images, prompts))


def _make_expert(name: str, settings: Settings, place: Callable) -> tuple[Reward, PyTree]:
    threads = {"deadline": settings.deadline, "num_workers": settings.num_workers}
    match name.split(":"):
        case [known] if known in HOST:
            return on_host(name, HOST[known], **threads), ()
        case [known] if known in DEVICE:
            pure, prepare, params = DEVICE[known](settings, place)
            return on_device(name, pure, prepare), params
        case [_, _]:
            return on_host(name, load_object(name), **threads), ()
        case ["device", module, function]:
            fn = load_object(f"{module}:{function}")
            return on_device(name, lambda params, images, inputs: fn(images), lambda prompts: ()), ()
    known = sorted([*HOST, *DEVICE])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"reward.name: there is no reward {name!r}.{hint} Choose from {', '.join(known)}, or give a function of "
        "yours as module:function (or device:module:function if JAX can trace it)."
    )


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
) -> Float32[np.ndarray, " b"]:
    try:
        scores = np.asarray(fn(images, prepare(prompts)))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise RunStopped(f"reward {name} raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(images),) or scores.dtype.kind not in "fiub":
        raise UserError(
            f"reward {name} must return shape ({len(images)},), one number a picture, "
            f"not shape {scores.shape} of {scores.dtype}"
        )
    return _finite_or_missing(scores)


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


def _check_pixels(name: str, lowest: float, highest: float) -> None:
    if lowest < -_PIXEL_TOLERANCE or highest > 1 + _PIXEL_TOLERANCE:
        raise UserError(
            f"reward {name} was given pixels from {lowest:g} to {highest:g}: pixels are float in [0, 1] everywhere. "
            "Map them once, where the pictures are made: (x + 1) / 2 from [-1, 1], x / 255 from 8 bits."
        )
