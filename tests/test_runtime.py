"""What a process settles before its first program: memory stays with it, and on CPU LLVM optimizes less."""

import ctypes
import os
import subprocess
import sys

import jax
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
for _ in range(5):  # until it has all that it wants
    jax.block_until_ready(program(x, kernel))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    jax.block_until_ready(program(x, kernel))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from ddpo_jax.runtime import keep_freed_memory; keep_freed_memory()"


def page_faults(first: str, **variables: str) -> int:
    """Of 8 calls of a program."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu", **variables}
    told = subprocess.run([sys.executable, "-c", FAULTS.format(first)], env=environ, capture_output=True, check=True)
    return int(told.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's")
def test_a_program_finds_its_memory_where_it_left_it():
    kept, anew = page_faults(KEEP), page_faults("")
    assert kept < anew / 4
    assert page_faults(KEEP, MALLOC_MMAP_THRESHOLD_="131072") > anew / 2  # who sets malloc up has it so


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [("cpu", True, True), ("cuda", False, False), ("cuda,cpu", False, False), ("", False, True), ("", True, False)],
)
def test_only_where_programs_run_on_the_cpu(monkeypatch, platforms, plugins, expected):
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if plugins else None)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert runtime._on_cpu() == expected
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(("own", "expected"), [("", 1), (f"--{runtime.LEVEL}=2", 2)])
def test_the_level_that_llvm_optimizes_at(tmp_path, own, expected):
    """As XLA itself tells, of a program; what the environment asks for is done."""
    environ = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={tmp_path} {own}", "JAX_PLATFORMS": "cpu"}
    code = "from ddpo_jax import runtime; runtime.set_up(''); import jax; jax.jit(lambda x: 2 * x)(1.0)"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    (told,) = tmp_path.glob("*lambda*debug_options*")
    assert f"{runtime.LEVEL}: {expected}\n" in told.read_text()


@pytest.mark.parametrize(("on_cpu", "flags"), [(False, ""), (True, "/a/file/of/flags")])
def test_flags_that_are_left_as_they_are(monkeypatch, on_cpu, flags):
    """Those of an accelerator, and those that are a file's name: XLA would look for one of a longer name."""
    monkeypatch.setattr(runtime, "_on_cpu", lambda: on_cpu)
    monkeypatch.setenv("XLA_FLAGS", flags)
    runtime.optimize_less()
    assert os.environ["XLA_FLAGS"] == flags


FAULT = """
import jax, jax.numpy as jnp
from ddpo_jax import runtime
from ddpo_jax.errors import RunStopped
from ddpo_jax.rewards.kinds import on_device

def fail(images):
    raise OSError("the scorer's disk is full")

def pure(params, images, inputs):
    return jax.pure_callback(fail, jax.ShapeDtypeStruct((len(images),), jnp.float32), images)

runtime.set_up("")
reward = on_device("full", pure, lambda prompts: ())
try:
    reward.result(reward.submit((), jnp.ones((2, 4, 4, 3)), None))
except RunStopped as error:
    print(error)
"""


def test_a_reward_that_fails_while_its_caller_waits_is_told_of_as_one_on_the_device():
    environ = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", FAULT], env=environ, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("reward full failed on the device")
    assert "the scorer's disk is full" in told.stdout
