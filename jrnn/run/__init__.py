"""Runs steps over time. `scan` runs the body of any ``jax.lax.scan``."""
