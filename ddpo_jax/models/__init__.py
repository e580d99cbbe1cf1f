"""Flax Linen networks, and the checkpoint folders they are loaded from. The only place that imports flax.linen."""
