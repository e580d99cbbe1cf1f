"""python -m ddpo_jax.main --config=configs/NAME.py [--config.train.learning_rate=1e-5] [--workdir=DIR]"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddpo_jax.command import EXIT_STOPPED, EXIT_USER_ERROR, fail, quieten
from ddpo_jax.config import parse
from ddpo_jax.errors import Preempted, RunStopped, UserError

HELP = f"""{__doc__}

A run of several processes, one a host, is the same command on each. Under Slurm, Open MPI and Kubernetes and on a TPU
pod they find each other; elsewhere give each --coordinator_address=HOST:PORT --num_processes=N --process_id=I, or the
environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

Every field of the config is described in configs/base.py. The workdir is runs/<config name> by default; the same
command continues the run that is in it."""

EXIT_FAULT = 1
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def main(argv: list[str] | None = None) -> int:
    """Runs a training; the exit status. Errors that a user can mend are one line on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    quieten()
    status = run(argv)
    if "jax" in sys.modules:
        from ddpo_jax import multihost

        # Those that end well or were asked to stop all do; the first may still draw the report.
        multihost.leave(status, seconds=300 if status in (0, EXIT_PREEMPTED) else multihost.MEETING)
    return status


def run(argv: list[str]) -> int:
    """The exit status of a training."""
    try:
        with preemptible() as watch:
            config, workdir, processes = parse(argv)
            # After the signal handler and the flags: JAX takes seconds to import.
            from ddpo_jax import multihost, runtime
            from ddpo_jax.train import train

            runtime.set_up(config.compilation_cache)
            multihost.initialize(processes)
            train(config, workdir, argv, watch)
    except UserError as error:
        return fail("error", error, EXIT_USER_ERROR)
    except RunStopped as error:
        return fail("stopped", error, EXIT_STOPPED)
    except Preempted as error:
        print(error, file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last whole round", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return EXIT_FAULT
    return 0


@contextmanager
def preemptible() -> Iterator[Callable[[], None]]:
    """Raises Preempted in the main thread at the first SIGTERM; later ones are ignored while the run is saved.

    Gives a function that raises it too, once there was one: Python drops what a handler raises inside a destructor.
    """
    asked = Preempted("SIGTERM: stopped; the same command continues from the last whole round")
    stopped = False

    def watch() -> None:
        if stopped:
            raise asked

    def stop(signum: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise asked

    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
