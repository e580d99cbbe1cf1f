"""What all tests share: eight simulated CPU devices, strict ranks, compiled programs kept, one small model folder."""

import os

# Before jax is imported: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Optimization level 0 halves the compile times, which are most of the tests' time. Subprocesses inherit both.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)

from pathlib import Path

import jax
import pytest

CACHE = Path(os.environ.get("DDPO_JAX_TEST_CACHE") or Path(__file__).parents[1] / ".cache" / "jax")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A whole Stable Diffusion folder with random weights. Do not write to it."""
    from small import write_folder

    return write_folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def test_cache():
    """Where compiled programs are kept, for processes that a test starts."""
    return CACHE
