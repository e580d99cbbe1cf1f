"""What a run says of its time."""

import types

import jax
import jax.numpy as jnp
import pytest

from ddpo_jax import clock


def test_every_second_is_in_one_account(monkeypatch):
    ticks = iter([0.0, 1.0, 4.0, 10.0, 12.0, 30.0])  # begin, two blocks, the question
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    with clock.running_clock() as running:
        with running.spend("loading"):
            pass
        with pytest.raises(KeyError), running.spend("evaluations"):
            raise KeyError
        running.add({"rollout": 5.0, "update": 7.0})
        running.add({"rollout": 4.0})
        found = running.split()
    assert found == (
        "30 s in all: rollout 9 s, update 7 s, loading 3 s, evaluations 2 s, the rest 9 s; compiling was 0 s of it"
    )


def test_compiling_is_seen_while_the_clock_runs_and_not_after():
    heard = []
    with clock.running_clock() as running:
        jax.monitoring.record_event_duration_secs(clock.COMPILE, 40.0)
        jax.monitoring.record_event_duration_secs("/jax/another", 500.0)
        heard.append(running.split())
    jax.monitoring.record_event_duration_secs(clock.COMPILE, 40.0)
    heard.append(running.split())
    assert all(line.endswith("compiling was 40 s of it") for line in heard)


def test_programs_that_are_compiled_at_once_are_counted_once():
    spans = [(6.0, 7.0), (0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 8.5), (6.0, 6.5)]
    assert clock.covered(spans) == 5.0 + 1.0 + 0.5
    assert clock.covered([]) == 0.0


def test_the_compiler_tells_under_the_name_that_is_watched():
    told = []

    def listen(event, seconds, **_):
        told.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert clock.COMPILE in told
