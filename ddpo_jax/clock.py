"""Where a run's time goes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

# XLA alone, without tracing. Reading a program from the persistent cache counts too: it is short. So does what a thread
# compiles, whatever the others do meanwhile.
COMPILE = "/jax/core/compile/backend_compile_duration"


class Clock(NamedTuple):
    """Seconds on a wall clock, by what took them."""

    spend: Callable  # name -> context manager whose seconds are `name`'s
    add: Callable  # seconds by name
    split: Callable  # () -> all of them since the clock began, in one line


@contextmanager
def running_clock() -> Iterator[Clock]:
    """A clock that runs from here on, and watches the compiler while the context lasts."""
    begin, spent, compiled = time.monotonic(), Counter(), []

    def watch(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILE:
            end = time.monotonic()
            compiled.append((end - seconds, end))

    @contextmanager
    def spend(name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            spent[name] += time.monotonic() - start

    def split() -> str:
        total = time.monotonic() - begin
        parts = [*spent.most_common(), ("the rest", total - spent.total())]
        accounts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts)
        return f"{total:.0f} s in all: {accounts}; compiling was {covered(compiled):.0f} s of it"

    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        yield Clock(spend, spent.update, split)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in one of the spans (begin, end) or in several."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
