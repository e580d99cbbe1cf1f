"""A party of a comparison: a process that takes jobs as JSON lines and answers each with one. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Phases = dict[str, dict[str, float]]  # by name: seconds of wall clock and of this process's CPU


def serve(jobs: Mapping[str, Callable]) -> None:
    """Answers {"job": name, **arguments} with {"result": ...} or {"error": ...}, line by line, until there are no more.

    Whatever libraries print goes to standard error, so that standard output is answers alone.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(answer(line, jobs) + "\n")
            answers.flush()


def answer(line: str, jobs: Mapping[str, Callable]) -> str:
    """The answer to one line."""
    try:
        arguments = json.loads(line)
        return json.dumps({"result": jobs[arguments.pop("job")](**arguments)})
    except Exception:
        return json.dumps({"error": traceback.format_exc()})


def read_answer(line: str) -> Any:
    """The result in a line that `answer` made.

    Raises:
        RuntimeError: the job failed, and this says how; or there was no answer.
    """
    if not line:
        raise RuntimeError("the process has ended without an answer; its standard error says why")
    told = json.loads(line)
    if "error" in told:
        raise RuntimeError(told["error"])
    return told["result"]


@contextmanager
def timed(phases: Phases, name: str) -> Iterator[None]:
    """Puts into `phases` what its body takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    phases[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
