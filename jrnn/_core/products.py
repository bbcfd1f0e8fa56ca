"""A matmul with weights whose transposes are written out, which needs more than JAX's public API.

With ``dz`` the cotangent of ``z = x W``::

    dx = dz W^T          dW = x^T dz, which jax.lax.dot_general transposes to as (dz^T x)^T

On a CPU the second form of ``dW`` is slower than the first. So the matmul is a primitive of its own, whose transpose
has the first form. If JAX lacks the internals that a primitive needs, the matmul is a `dot_general`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn._core.devices import is_placed

__all__ = ["weigh"]


def weigh(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w`` over the last axis of x and the first of w: ``(*B, F), (F, K) -> (*B, K)``, floats of one dtype."""
    # The primitive has no rule for the sharding of its result over a mesh.
    return _dot(x, w) if _weigh_p is None or is_placed(x) or is_placed(w) else _weigh_p.bind(x, w)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _for_x(ct: jax.Array, x: Any, w: jax.Array) -> jax.Array:
    return lax.dot_general(ct, w, (((ct.ndim - 1,), (1,)), ((), ())))


def _for_w(ct: jax.Array, x: jax.Array, w: Any) -> jax.Array:
    batch = tuple(range(x.ndim - 1))
    return lax.dot_general(x, ct, ((batch, batch), ((), ())))


def _primitive() -> Any:
    try:
        from jax.extend.core import Primitive
        from jax.interpreters import ad, batching, mlir

        def batched(args: Any, axes: Any) -> Any:
            if axes[1] is None:  # more rows
                return weigh_p.bind(jnp.moveaxis(args[0], axes[0], 0), args[1]), 0
            return jax.vmap(_dot, axes)(*args), 0

        weigh_p = Primitive("weigh")
        weigh_p.def_impl(_dot)
        weigh_p.def_abstract_eval(lambda x, w: x.update(shape=(*x.shape[:-1], w.shape[1]), weak_type=False))
        ad.defbilinear(weigh_p, _for_x, _for_w)
        batching.primitive_batchers[weigh_p] = batched
        mlir.register_lowering(weigh_p, mlir.lower_fun(_dot, multiple_results=False))
    except (AttributeError, ImportError):
        return None
    return weigh_p


_weigh_p = _primitive()
