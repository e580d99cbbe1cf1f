"""What all tests share: eight simulated CPU devices, strict ranks, compiled programs kept, one small model folder."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported: it reads these once, and processes that a test starts inherit them. Compiling is most of the
# tests' time, and their programs are small: optimization level 0 halves it, and XLA's older emitters halve it again
# (a flag that jaxlib 0.12 no longer knows, and dies of).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's: two workers' threads would wait for each other
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

# Traced programs are millions of objects that stay; to look through them for garbage took a tenth of the time.
gc.set_threshold(100_000, 50, 1000)

import jax  # noqa: E402
import pytest  # noqa: E402

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
