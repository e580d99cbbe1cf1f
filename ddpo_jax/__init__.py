"""ddpo_jax: aligning text-to-image diffusion models by reward or preference, in JAX."""

import os

# Before anything imports transformers, of which only tokenizers are read, and which would say that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
