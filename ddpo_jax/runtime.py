"""What JAX is told once, before its first array."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

import jax

# glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def set_up(compilation_cache: str) -> None:
    """Compiled programs are kept in that folder, unless it is ""; on a processor so is the memory that they free."""
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets malloc keep what a program frees, for the next one.

    On a processor XLA takes a program's scratch memory from malloc at each call, and frees it after. glibc would map so
    large a block anew each time, and the kernel would clear it page by page: a quarter of the embedded model's update.
    The process stays as large as it once was. Does nothing where an accelerator may be, whose scratch memory JAX keeps
    itself, nor beside another malloc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or not _on_processor():
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    # Programs run on the main thread then: glibc would map what is above 64 MB for any other. One arena for all threads
    # does it too, but those of the compiler wait for it, a third longer.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _on_processor() -> bool:
    """Whether JAX finds no accelerator: it was told so, or has no plugin for one."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" if platforms else not (find_spec("jax_plugins") or find_spec("libtpu"))
