"""Readouts that are solved for, not trained."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import sequence
from jrnn._core.checks import finite, non_negative_int
from jrnn.cells.base import is_complex, stable, vector

__all__ = ["ridge"]


def ridge(
    states: jax.Array,
    targets: jax.Array,
    alpha: float,
    *,
    washout: int = 0,
    lengths: Any = None,
    mask: Any = None,
) -> dict[str, jax.Array]:
    """The linear readout of least squares with a penalty (ridge regression), in closed form::

        minimise  sum_t |states[t] w + b - targets[t]|^2 + alpha |w|^2      over w and b, at the steps that count

    It is solved by a QR decomposition of the states, which is more accurate in float32 than the normal equations.

    T time, B batch axes (any number, or none), H features of the states.

    Args:
      states: ``(T, *B, H)``, the outputs of a reservoir or of any other layer, from `jrnn.unroll`.
      targets: ``(T, *B, out)``, in the dtype of the states.
      alpha: the weight of the penalty, positive. The bias is not penalised.
      washout: the number of steps at the beginning that do not count, since they still depend on the initial state.
      lengths: ``(*B,)`` integers, as for `jrnn.unroll`.
      mask: ``(T, *B)`` booleans, true at steps that count.

    Returns:
      ``{"w": (H, out), "b": (out,)}``: the parameters of ``jrnn.dense(out)``.

    Raises:
      ValueError, TypeError: if shapes or dtypes differ, ``alpha`` is not positive, or ``washout`` leaves no
        steps.

    >>> states = jax.random.normal(jax.random.key(0), (100, 2, 3))
    >>> targets = states @ jnp.array([[1.0], [2.0], [3.0]]) + 4.0
    >>> readout = jrnn.ridge(states, targets, alpha=1e-6)
    >>> [round(float(v), 3) for v in (*readout["w"][:, 0], *readout["b"])]
    [1.0, 2.0, 3.0, 4.0]
    """
    states, targets = jnp.asarray(states), jnp.asarray(targets)
    finite(alpha, "alpha", above=0.0)
    non_negative_int(washout, "washout")
    for name, value in (("states", states), ("targets", targets)):
        if is_complex(value) or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name}: expected floats, got {value.dtype}; convert them with .astype")
        if value.ndim < 2:
            raise ValueError(f"{name}: expected (T, *B, features), got shape {value.shape}")
    if states.shape[:-1] != targets.shape[:-1]:
        raise ValueError(
            f"targets: expected the time and batch axes {states.shape[:-1]} of states, got shape {targets.shape}"
        )
    if targets.dtype != states.dtype:
        raise TypeError(
            f"targets: expected {states.dtype} like the states, got {targets.dtype}; convert one of the two"
        )
    time, batch = states.shape[0], states.shape[1:-1]
    if washout >= time:
        raise ValueError(f"washout: expected fewer steps than there are, {time}, got {washout}")
    valid = sequence.valid_steps(lengths, mask, time, batch)
    valid = jnp.ones((time, *batch), bool) if valid is None else jnp.broadcast_to(valid, (time, *batch))
    valid = valid[washout:].reshape(-1, 1)
    dtype = stable(states.dtype)

    def rows(a: jax.Array) -> jax.Array:
        a = a[washout:].reshape(-1, a.shape[-1]).astype(dtype)
        return jnp.where(valid, a, jnp.zeros((), dtype))

    x, y = rows(states), rows(targets)
    count = jnp.maximum(valid.sum(), 1).astype(dtype)
    x_mean, y_mean = x.sum(0) / count, y.sum(0) / count
    x = jnp.where(valid, x - vector(x_mean, x), jnp.zeros((), dtype))
    y = jnp.where(valid, y - vector(y_mean, y), jnp.zeros((), dtype))
    penalty = math.sqrt(alpha) * jnp.eye(x.shape[1], dtype=dtype)
    q, r = jnp.linalg.qr(jnp.concatenate([x, penalty]))
    w = jax.scipy.linalg.solve_triangular(r, _matmul(q[: x.shape[0]].T, y))
    return {"w": w, "b": y_mean - _matmul(x_mean[None], w)[0]}


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
