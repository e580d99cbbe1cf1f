"""Reading one round ahead: each round once and in order, errors where they belong, and nothing left behind."""

import signal
import threading
import time

import pytest

from ddpo_jax.ahead import one_ahead
from ddpo_jax.errors import UserError


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "next round"]


def test_each_round_is_drawn_once_in_order_and_one_ahead():
    begun, threads = [], set()

    def draw(epoch, watch):
        begun.append(epoch)
        threads.add(threading.current_thread())
        return f"round {epoch}"

    with one_ahead(draw, range(3, 6)) as take:
        for epoch in range(3, 6):
            assert take() == f"round {epoch}"
            ahead = list(range(3, min(epoch + 2, 6)))  # none past the last
            wait_until(lambda ahead=ahead: begun == ahead)
            time.sleep(0.02)
            assert begun == ahead
    assert len(threads) == 1 and not readers()


def test_a_run_without_rounds_draws_none():
    with one_ahead(lambda epoch, watch: pytest.fail("drawn"), range(5, 5)):
        pass
    assert not readers()


def test_an_error_is_raised_in_the_round_that_needs_it():
    failed = threading.Event()

    def draw(epoch, watch):
        if epoch == 1:
            failed.set()
            raise UserError("picture 7 cannot be read")
        return epoch

    with one_ahead(draw, range(9)) as take:
        assert take() == 0
        failed.wait(30)
        with pytest.raises(UserError, match="picture 7"):
            take()
    assert not readers()


def test_leaving_stops_a_round_that_is_being_read():
    reading, pictures = threading.Event(), []

    def draw(epoch, watch):
        while epoch == 1:
            watch()
            pictures.append(epoch)
            reading.set()
            time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(OSError, match="disk"), one_ahead(draw, range(9)) as take:
        take()
        reading.wait(30)
        raise OSError("the disk is full")
    count = len(pictures)
    time.sleep(0.05)
    assert len(pictures) == count and not readers() and time.monotonic() - begin < 5


def test_a_signal_ends_the_wait_for_a_round():
    def draw(epoch, watch):
        while True:
            watch()
            time.sleep(0.01)

    def stop(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt), one_ahead(draw, range(9)) as take:
            take()
        assert time.monotonic() - begin < 5 and not readers()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
