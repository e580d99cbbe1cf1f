"""The next round's data, read on a thread while this round trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

PATIENCE = 10.0  # seconds that the thread is waited for; it may be inside a function of the user's own


class Unwanted(Exception):
    """Ends the reading of a round that will not come."""


@contextmanager
def one_ahead(draw: Callable, rounds: range) -> Iterator[Callable[[], Any]]:
    """Gives a function: () -> the inputs of the next of these rounds, while those of the one after it are begun.

    All are drawn on one thread, which ends with the context. What the drawing of a round raises is raised here, where
    the round is asked for.

    draw: epoch, watch -> inputs; it calls `watch` again and again, and stops if that raises.
    """
    asked, drawn, left, to_come = SimpleQueue(), SimpleQueue(), threading.Event(), iter(rounds)

    def watch() -> None:
        if left.is_set():
            raise Unwanted

    def work() -> None:
        for epoch in iter(asked.get, None):
            try:
                drawn.put((draw(epoch, watch), None))
            except BaseException as error:
                drawn.put((None, error))

    def take() -> Any:
        inputs, error = drawn.get()
        if error:
            raise error
        asked.put(next(to_come, None))
        return inputs

    thread = threading.Thread(target=work, name="next round", daemon=True)
    thread.start()
    asked.put(next(to_come, None))
    try:
        yield take
    finally:
        left.set()
        asked.put(None)
        thread.join(PATIENCE)
