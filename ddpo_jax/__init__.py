"""ddpo_jax: aligning text-to-image diffusion models by reward or preference, in JAX."""
