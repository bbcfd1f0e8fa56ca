"""How a step is run over time: `scan`, for the body of any ``jax.lax.scan``."""
