"""Layer normalisation of gates (Ba, Kiros and Hinton 2016), shared by the normalised cells and `jrnn.layer_norm`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import vector


def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """``(x - mean) / sqrt(variance + epsilon) * scale`` over the last axis."""
    return layer_norm_gates((x,), (scale,), epsilon)[0]


def layer_norm_gates(xs: tuple[jax.Array, ...], scales: tuple[jax.Array, ...], epsilon: float) -> tuple[jax.Array, ...]:
    """The same over several arrays as if they were one, joined on the last axis."""
    count = sum(x.shape[-1] for x in xs)
    mean = sum(jnp.sum(x, -1, keepdims=True) for x in xs) / count
    centred = tuple(x - mean for x in xs)
    variance = sum(jnp.sum(x * x, -1, keepdims=True) for x in centred) / count
    inverse = lax.rsqrt(variance + epsilon)
    return tuple(x * inverse * vector(scale, x) for x, scale in zip(centred, scales, strict=True))
