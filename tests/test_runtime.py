"""Memory that stays with the process: what a program has freed the next one finds, without the kernel's help."""

import os
import subprocess
import sys

import pytest

from ddpo_jax import runtime

FAULTS = """
import resource
{}
import jax, jax.numpy as jnp

def loss(x, kernel):
    for _ in range(4):
        x = jnp.tanh(x @ kernel)
    return x.sum()

program = jax.jit(jax.grad(loss, argnums=1))
x, kernel = jnp.ones((50_000, 128)), jnp.ones((128, 128))  # 26 MB an array between

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(x, kernel))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sum(faults() > 10_000 for _ in range(40)))
"""
KEEP = "from ddpo_jax.runtime import keep_freed_memory; keep_freed_memory()"


def cleared_anew(first: str) -> int:
    """In how many of 40 calls the kernel gives memory. A call may begin before the last one has let go of its own."""
    flags = "--xla_force_host_platform_device_count=1"
    environ = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", FAULTS.format(first)], env=environ, capture_output=True, check=True)
    return int(told.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_program_finds_its_memory_where_it_left_it():
    assert cleared_anew(KEEP) < 20
    assert cleared_anew("") == 40


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [("cpu", True, True), ("cuda", False, False), ("cuda,cpu", False, False), ("", False, True), ("", True, False)],
)
def test_only_where_programs_run_on_the_processor(monkeypatch, platforms, plugins, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if plugins else None)
    assert runtime._on_processor() == expected
