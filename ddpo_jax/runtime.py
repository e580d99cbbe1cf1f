"""What JAX is told once, before its first array."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

import jax

# glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LEVEL = "xla_backend_optimization_level"


def set_up(compilation_cache: str) -> None:
    """Keeps compiled programs in that folder (nowhere if it is ""). On CPU they compile sooner, and find memory."""
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
    optimize_less()
    keep_freed_memory()


def optimize_less() -> None:
    """Lets LLVM optimize at level 1 of 3 on CPU, unless XLA_FLAGS name a level, or a file of flags.

    The embedded model's programs are as fast, as most of their time is in products of matrices, and take an eighth less
    of the time to compile. Level 0 halves their speed.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    names_file = flags and not flags.startswith("-")
    if _on_cpu() and LEVEL not in flags and not names_file:
        os.environ["XLA_FLAGS"] = f"{flags} --{LEVEL}=1".strip()


def keep_freed_memory() -> None:
    """Lets malloc keep what a program frees, for the next one.

    On CPU XLA takes a program's scratch memory from malloc at each call, and frees it after. glibc would map so large a
    block anew each time, and the kernel would clear it page by page: a quarter of the embedded model's update. What the
    process has had it keeps, holes between its blocks as well. Does nothing where an accelerator may be, whose scratch
    memory JAX keeps itself, and where the environment has settings of malloc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if mallopt is None or own or not _on_cpu():
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    # With one device a program then runs on the thread that calls it, the main one: glibc would map what is above 64 MB
    # for any other. To have one arena for all threads does it too, but the compiler's wait for each other there, and
    # take a third longer.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _on_cpu() -> bool:
    """Whether JAX finds no accelerator: it was told so, or has no plugin for one."""
    platforms = jax.config.jax_platforms
    return platforms == "cpu" if platforms else not (find_spec("jax_plugins") or find_spec("libtpu"))
