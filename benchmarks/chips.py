"""Chips to compile for, on a machine without them: XLA needs to know the chip, not to have it.

An H100: pip install --no-deps jax-cuda12-plugin==$(pip show jax | sed -n 's/^Version: //p') jax-cuda12-pjrt==(the same)
A TPU: pip install 'jax[tpu]', the same JAX
"""

from __future__ import annotations

import os

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

MEMORY = 84_942_979_072  # bytes

# An H100 SXM as CUDA describes it (the CUDA programming guide's table for compute capability 9.0, NVIDIA's data sheet).
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: {MEMORY}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation"  name: "NVIDIA H100 80GB HBM3"  device_address_bits: 64
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def on_chip(name: str) -> SingleDeviceSharding:
    """Where abstract arrays are, for a program that is lowered and compiled for this chip, and never run.

    name: "h100", or a TPU's generation, such as "v5e".

    Raises:
        RuntimeError: JAX's plugin for it is not installed; the message says how.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # it tells of the driver that is not there
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no machine is to be asked for which TPU it has
    cuda = f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    try:
        if name == "h100":
            topology = topologies.get_topology_desc(name, platform="cuda", topology="1x1x1", target_config=H100)
        else:
            topology = topologies.get_topology_desc(f"{name}:2x2", platform="tpu")
    except Exception as error:  # the plugin's absence has no type of its own
        wanted = cuda if name == "h100" else f"pip install 'jax[tpu]=={jax.__version__}'"
        raise RuntimeError(f"JAX's plugin for {name} is needed ({error}): {wanted}") from error
    return SingleDeviceSharding(topology.devices[0])
