"""Several processes of one run: how they find each other, agree, and stop together. One process is the same code.

Every process runs the same programs on the same inputs, and holds its own part of the arrays. What a process finds out
by itself alone (a reward, an error, what is in a file) is told to all at fixed places, so that none waits for another
that has gone a different way.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int

from ddpo_jax.errors import Preempted, RunStopped, UserError
from ddpo_jax.types import PyTree

HEARTBEAT = 30  # seconds without a sign of life after which a process is taken for dead, and the others end
MEETING = 5  # seconds that a process which cannot go on waits for the others to hear of it
SETTLING = 20  # seconds that those which stop together wait for what they have begun: a cluster gives 30 in all
BUSY = 24 * 3600  # seconds that one may be busy while the others wait for it

_meetings = itertools.count()  # as many on every process
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
AGREED = {kind.__name__: kind for kind in (UserError, RunStopped)}


def initialize(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, if there are any; does nothing, and waits for nobody, if there are none.

    flags: coordinator_address ("host:port"), num_processes and process_id, all or none. Where they are None, the
    environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are read; without those, what Slurm,
    Open MPI, Kubernetes or a TPU pod say.

    Raises:
        UserError: some of the three are given and others are not, or the processes do not find each other.
    """
    explicit = _explicit(flags, environment)
    if explicit is None and not find_cluster(environment) and not _on_tpu_vm():
        return
    if explicit and explicit["num_processes"] == 1:
        return
    known = explicit or {"local_device_ids": devices_of_a_task(environment)}
    if explicit:  # otherwise JAX would still ask Slurm which of the devices are this process's
        known["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=HEARTBEAT)
    except Exception as error:  # of many types, by what is there of a cluster
        if explicit is None and not find_cluster(environment) and jax.process_count() == 1:
            return  # a TPU machine by itself
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); start all of them, each with"
            f" {', '.join(f'--{name}' for name in VARIABLES)}"
        ) from error


def _explicit(flags: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Address, number and position, as flags or variables give them; None if they do not."""
    given = {
        name: environment.get(variable) if flags.get(name) in (None, "") else flags[name]
        for name, variable in VARIABLES.items()
    }
    missing = [name for name, value in given.items() if value in (None, "")]
    if len(missing) == len(given):
        return None
    told = ", ".join(f"--{name} (or {variable})" for name, variable in VARIABLES.items())
    if missing and find_cluster(environment):
        return None  # JAX knows the rest
    if missing:
        raise UserError(f"--{missing[0]} is missing; give all of {told}, or none")
    try:
        number, position = int(given["num_processes"]), int(given["process_id"])
    except ValueError:
        raise UserError(
            f"--num_processes={given['num_processes']} --process_id={given['process_id']}: expected whole numbers, such"
            " as 2 and 0"
        ) from None
    if not 0 <= position < number:
        raise UserError(
            f"--num_processes={number} --process_id={position}: expected 1 process or more, and to number them from 0"
        )
    if not re.fullmatch(r".+:\d+", given["coordinator_address"]):
        raise UserError(f"--coordinator_address={given['coordinator_address']}: expected HOST:PORT, as in node1:12355")
    return {"coordinator_address": given["coordinator_address"], "num_processes": number, "process_id": position}


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """What started this process beside others that jax.distributed can find by itself; None if nothing did."""

    def number(variable: str) -> int:
        value = environment.get(variable, "")
        return int(value) if value.isdigit() else 1

    many = {
        # Of a step, not of a job: a shell in an allocation is one process, whatever the job asked for.
        "Slurm": number("SLURM_STEP_NUM_TASKS") > 1,
        "Open MPI": number("OMPI_COMM_WORLD_SIZE") > 1,
        "TPU": "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment,
        "Kubernetes": "KUBERNETES_SERVICE_HOST" in environment
        and "JOB_COMPLETION_INDEX" in environment
        and importlib.util.find_spec("kubernetes") is not None,  # through which JAX asks for the other pods
    }
    return next((name for name, there in many.items() if there), None)


def _on_tpu_vm() -> bool:
    """Whether there are TPU chips. Of a pod on Compute Engine the environment says nothing; JAX asks for it there."""
    chips = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None


def devices_of_a_task(environment: Mapping[str, str]) -> list[int] | None:
    """All of a Slurm node's GPUs where it has one task, of which JAX would take the first; None leaves it to JAX."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    number = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(number))) if alone and number.isdigit() else None


def is_main() -> bool:
    """Whether this is the process that writes what there is one of: logs, pictures, exports."""
    return jax.process_index() == 0


def agree(error: UserError | RunStopped | None) -> None:
    """Raises on every process what was found on any, the first one's; each calls it at the same place.

    One that has an error waits MEETING seconds for the others, which may be busy for long, and then raises it alone.
    """
    if jax.process_count() > 1:
        if not meet(MEETING if error else BUSY):
            raise error or RunStopped("another process of this run cannot go on; its output says why")
        found = _gather({"kind": _kind(error), "text": str(error)} if error else None)
        for position, told in enumerate(found):
            if told:
                raise AGREED[told["kind"]](f"process {position}: {told['text']}") from error
    if error:
        raise error


def meet(seconds: int | float) -> bool:
    """Whether all processes come here before so many seconds have passed; no device takes part in it."""
    barrier, key, met = ocp.multihost.get_barrier_sync_fn(), f"ddpo_jax_{next(_meetings)}", threading.Event()

    def wait() -> None:
        with suppress(Exception):  # of jaxlib's own types: another has gone
            barrier(key=key, timeout_ms=1000 * BUSY)
            met.set()

    # On a thread: the service knows one timeout for all, that of the first.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(seconds)
    return met.is_set()


def together(body: Callable[[], Any]) -> Any:
    """body(); each process calls it at the same place.

    Raises:
        UserError, RunStopped: on all, if body did on any. Other errors leave at once, and take the run with them.
    """
    value, error = None, None
    try:
        value = body()
    except (UserError, RunStopped) as caught:
        error = caught
    agree(error)
    return value


def on_main(body: Callable[[], Any]) -> Any:
    """What body() gives on the main process, a JSON value, for every process. Errors are as in `together`."""
    value = together(lambda: body() if is_main() else None)
    return _gather(value)[0] if jax.process_count() > 1 else value


@contextmanager
def inside_on_main(context: AbstractContextManager) -> Iterator[Any]:
    """The context, entered on the main process alone; what it gives, None elsewhere."""
    with ExitStack() as stack:
        entered = []
        on_main(lambda: entered.append(stack.enter_context(context)))
        yield entered[0] if entered else None


def union(numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The numbers that any process has, each once, in order; each calls it at the same place."""
    found = _gather(numbers.tolist()) if jax.process_count() > 1 else [numbers]
    return np.unique(np.concatenate(found).astype(int))


def gather_scores(scores: Float32[np.ndarray, "b experts"]) -> Float32[np.ndarray, "b experts"]:
    """The scores of all processes: each has those of its own rows, and NaN elsewhere."""
    if jax.process_count() == 1:
        return scores
    return np.fmax.reduce(multihost_utils.process_allgather(scores))


def to_host(tree: PyTree) -> PyTree:
    """The whole arrays as numpy, on every process; each calls it at the same place."""

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf)

    return jax.tree.map(whole, tree)


def watching(watch: Callable[[], None]) -> Callable[[], None]:
    """A function to be called again and again, at the same places on every process: raises once one is to stop.

    watch: the same for a process alone. Where JAX's coordination service runs, it catches SIGTERM, by which clusters
    give notice, and lets all stop at the same call.

    Raises (the function): Preempted.
    """
    if not jax.distributed.is_initialized():
        return watch
    calls = 0

    def watch_all() -> None:
        nonlocal calls
        calls += 1
        if multihost_utils.reached_preemption_sync_point(calls):
            raise Preempted("SIGTERM: all processes stopped; the same command continues from the last whole round")

    return watch_all


def settle(seconds: int | float) -> None:
    """Waits so long for the programs under way whose results are still held, if there are several processes.

    All have begun the same, as a rule, and whoever left now would break the others'. Those that an error parted have
    not, and would wait for ever.
    """

    def wait() -> None:
        with suppress(Exception):  # what they failed with is told elsewhere
            jax.block_until_ready(jax.live_arrays())

    if jax.process_count() > 1:
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(seconds)


def leave(status: int, *, seconds: int | float) -> None:
    """Ends this process if it is one of several, once all have come to their end or so many seconds have passed.

    Whoever is left alone notices that within HEARTBEAT, and ends too.
    """
    if not jax.distributed.is_initialized():
        return
    if meet(seconds):
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a clean exit would wait for threads, which may wait for processes


def _kind(error: UserError | RunStopped) -> str:
    return next(name for name, kind in AGREED.items() if isinstance(error, kind))


def _gather(value: Any) -> list[Any]:
    """The JSON value of each process, on all."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text), np.int32)).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]
