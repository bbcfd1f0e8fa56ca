"""What the gates of an affine cell read: u, with v in it where the sum is enough, then the other v.

``sums`` says of each gate whether ``u + v`` is enough (see `promises.sums`); slots and parts follow from it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["pack", "parts", "slots", "unpack"]


def parts(sums: tuple[bool, ...]) -> int:
    """How many arrays the gates read: u + v where that is enough, else u and v."""
    return 2 * len(sums) - sum(sums)


def slots(sums: tuple[bool, ...]) -> tuple[int, ...]:
    """Where each gate's recurrent part is among what the gates read: in its input part where the sum is enough.

    >>> slots((True, False, True))
    (0, 3, 2)
    """
    after = iter(range(len(sums), parts(sums)))
    return tuple(gate if summed else next(after) for gate, summed in enumerate(sums))


def unpack(sums: tuple[bool, ...], read: Any) -> tuple[Any, Any]:
    """``(u, v)`` for the gates, one array each, from what they read: v is zero where it is in the sum."""
    u = read[: len(sums)]
    return u, tuple(jnp.zeros_like(u[g]) if slot == g else read[slot] for g, slot in enumerate(slots(sums)))


def pack(sums: tuple[bool, ...], u: Any, v: jax.Array) -> jax.Array:
    """What the gates read of ``u`` (one array, or one a gate) and ``v``, side by side."""
    if all(sums):
        return (u if isinstance(u, jax.Array) else jnp.concatenate(u, -1)) + v
    us, vs = (tuple(jnp.split(a, len(sums), -1)) if isinstance(a, jax.Array) else a for a in (u, v))
    summed = [a + b if s else a for a, b, s in zip(us, vs, sums, strict=True)]
    return jnp.concatenate([*summed, *(b for b, s in zip(vs, sums, strict=True) if not s)], -1)
