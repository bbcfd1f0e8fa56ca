"""Where JAX computes unless told otherwise."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["default_device"]


def default_device() -> Any:
    """The device that ``jax.default_device`` or a platform's name chose, or else the first."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
