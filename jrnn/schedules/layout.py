"""The memory layouts of the arrays of a loop.

Arrays come with features last, ``(*B, H)`` for a step. With units first, ``(H, N)`` for a step of N sequences, each
gate is contiguous and the recurrent matmul streams the weights. That can be faster on a CPU, if the gates allow it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jrnn.cells.base import product, stable
from jrnn.cells.form import Gates
from jrnn.schedules.steps import select as select_rows


@dataclass(frozen=True)
class Rows:
    """Features last, the layout in which arrays come."""

    def enter(self, tree: Any, steps: bool = False, flags: bool = False) -> tuple[Any, ...]:
        """Arrays of one step, or with ``steps`` of several, in this layout: one tree for each part of the batch.

        ``flags`` says that the arrays have no axis of features.
        """
        return (tree,)

    def leave(self, parts: tuple[Any, ...], batch: tuple[int, ...], steps: bool = False) -> Any:
        """The parts of the batch joined again, features last."""
        return parts[0]

    def select(self, flags: Any, new: Any, old: Any) -> Any:
        return select_rows(flags, new, old)

    def weights(self, w: jax.Array) -> jax.Array:
        """Weights ``(H, K)`` in the form that `product` takes."""
        return w

    def product(self, h: jax.Array, w: jax.Array) -> jax.Array:
        """``h W``."""
        return product(h, w)

    def weights_t(self, w: jax.Array) -> jax.Array:
        """Weights ``(H, K)`` in the form that `product_t` takes: made once, or XLA transposes them at every step."""
        return w.T

    def product_t(self, h: jax.Array, w: jax.Array) -> jax.Array:
        """``h W`` again, written so that its transpose with respect to h is fast."""
        h = h.astype(w.dtype)
        return lax.dot_general(h, w, (((h.ndim - 1,), (1,)), ((), ())), preferred_element_type=stable(w.dtype))

    def split(self, z: jax.Array, count: int) -> tuple[jax.Array, ...]:
        """One array for each gate."""
        return tuple(jnp.split(z, count, axis=-1))

    def gates(self, gates: Gates, theta: Any, u: Any, v: Any, state: Any, key: Any) -> Any:
        return gates.combine(theta, u, v, state, key)


@dataclass(frozen=True)
class Units:
    """Units first, with the batch cut into ``parts`` that do not depend on each other.

    XLA runs the elementwise operations of a loop on one thread. With two parts, two threads can run them.
    """

    parts: int = 1

    def enter(self, tree: Any, steps: bool = False, flags: bool = False) -> tuple[Any, ...]:
        def part(i: int, a: jax.Array) -> jax.Array:
            lead, features = a.shape[: int(steps)], () if flags else a.shape[-1:]
            a = a.reshape(*lead, math.prod(a.shape[len(lead) : a.ndim - len(features)]), *features)
            n = a.shape[len(lead)] // self.parts
            a = lax.slice_in_dim(a, i * n, (i + 1) * n, axis=len(lead))
            return a if flags else jnp.swapaxes(a, -1, -2)

        return tuple(jax.tree.map(functools.partial(part, i), tree) for i in range(self.parts))

    def leave(self, parts: tuple[Any, ...], batch: tuple[int, ...], steps: bool = False) -> Any:
        def whole(*parts: jax.Array) -> jax.Array:
            rows = [jnp.swapaxes(a, -1, -2) for a in parts]
            a = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-2)
            return a.reshape(*a.shape[: int(steps)], *batch, a.shape[-1])

        return jax.tree.map(whole, *parts)

    def select(self, flags: Any, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(flags, n, o), new, old)

    def weights(self, w: jax.Array) -> jax.Array:
        return w.T

    def product(self, h: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(w, h.astype(w.dtype), (((1,), (0,)), ((), ())), preferred_element_type=stable(w.dtype))

    def weights_t(self, w: jax.Array) -> jax.Array:
        return w

    def product_t(self, h: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(w, h.astype(w.dtype), (((0,), (0,)), ((), ())), preferred_element_type=stable(w.dtype))

    def split(self, z: jax.Array, count: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(z, count, axis=-2))

    def gates(self, gates: Gates, theta: Any, u: Any, v: Any, state: Any, key: Any) -> Any:
        # Swapping the axes does not change an elementwise function, if vectors get a trailing axis for sequences.
        return gates.combine(jax.tree.map(lambda a: a[:, None], theta), u, v, state, None)
