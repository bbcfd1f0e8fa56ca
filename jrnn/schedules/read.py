"""The packed gate inputs of an affine cell: u, with v added where the gate needs only the sum, then the other v.

``sums`` says of each gate whether it needs only ``u + v`` (see `promises.sums`). Parts and slots follow from it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["pack", "parts", "slots", "unpack"]


def parts(sums: tuple[bool, ...]) -> int:
    """The number of arrays in the gate inputs: one for a gate that needs only ``u + v``, two for any other gate."""
    return 2 * len(sums) - sum(sums)


def slots(sums: tuple[bool, ...]) -> tuple[int, ...]:
    """The index of each gate's recurrent part v in the gate inputs: that of ``u + v`` if the gate needs only the sum.

    >>> slots((True, False, True))
    (0, 3, 2)
    """
    after = iter(range(len(sums), parts(sums)))
    return tuple(gate if summed else next(after) for gate, summed in enumerate(sums))


def unpack(sums: tuple[bool, ...], read: Any) -> tuple[Any, Any]:
    """``(u, v)`` from the gate inputs, one array for each gate. v is zero where it is already added to u."""
    u = read[: len(sums)]
    return u, tuple(jnp.zeros_like(u[g]) if slot == g else read[slot] for g, slot in enumerate(slots(sums)))


def pack(sums: tuple[bool, ...], u: Any, v: jax.Array) -> jax.Array:
    """The gate inputs, concatenated, from ``u`` (one array, or one for each gate) and ``v``.

    Without a recurrent product ``v`` has no columns, and every gate takes the sum.
    """
    if all(sums):
        u = u if isinstance(u, jax.Array) else jnp.concatenate(u, -1)
        return u + v if v.shape[-1] else u
    us, vs = (tuple(jnp.split(a, len(sums), -1)) if isinstance(a, jax.Array) else a for a in (u, v))
    summed = [a + b if s else a for a, b, s in zip(us, vs, sums, strict=True)]
    return jnp.concatenate([*summed, *(b for b, s in zip(vs, sums, strict=True) if not s)], -1)
