"""What cells with a matrix for a state share: their recurrence, many steps at once.

The state of a head is ``S (K, V)``, and a step is::

    S_t = a_t S_{t-1} + k_t u_t^T        y_t = S_t^T q_t

with a decay ``a_t = exp(l_t)`` in (0, 1]. Over a chunk of steps, with ``L_t = l_1 + ... + l_t``::

    y_t = sum_{s <= t} exp(L_t - L_s) (q_t . k_s) u_s + exp(L_t) S_0^T q_t

so that a chunk is a few products of matrices of its steps (Dao and Gu 2024; Yang et al. 2024). Sums run over steps that
no reset lies between. What stands at invalid steps must have been made neutral: ``l = 0`` and ``u = 0``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Of the exponents of what is left out. Not infinite: a difference of two of them would be NaN.
NEVER = -1e30


def by_step(flags: jax.Array, like: jax.Array) -> jax.Array:
    """``(T, *B)`` flags with axes of size one, to broadcast against ``(T, *B, ...)``."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def neutral(valid: jax.Array | None, a: jax.Array, value: float = 0.0) -> jax.Array:
    """``a (T, *B, ...)`` with another value at invalid steps."""
    return a if valid is None else jnp.where(by_step(valid, a), a, jnp.full((), value, a.dtype))


class Chunk(NamedTuple):
    """The steps of a chunk as seen by each other, of each sequence and head ``(*B, heads, ...)``.

    ``total (*B, heads, T)`` is L, which begins anew at a reset. ``seen (*B, 1, T, T)`` says which earlier steps s each
    step t remembers, itself included; ``start (*B, 1, T)`` whether t remembers the state before the chunk.
    """

    total: jax.Array
    seen: jax.Array
    start: jax.Array

    def decays(self) -> jax.Array:
        """``exp(L_t - L_s)`` where s is seen, zero elsewhere: ``(*B, heads, T, T)``."""
        return jnp.exp(jnp.where(self.seen, self.exponents(), jnp.full((), NEVER, self.total.dtype)))

    def exponents(self) -> jax.Array:
        """``L_t - L_s``."""
        return self.total[..., :, None] - self.total[..., None, :]

    def from_start(self) -> jax.Array:
        """``exp(L_t)`` where the state before the chunk is seen, zero elsewhere: ``(*B, heads, T)``."""
        return jnp.exp(jnp.where(self.start, self.total, jnp.full((), NEVER, self.total.dtype)))


def chunk_of(log_decays: jax.Array, resets: jax.Array | None) -> Chunk:
    """The chunk of ``log_decays (T, *B, heads)`` and ``resets (T, *B)``, which come before their steps."""
    time = log_decays.shape[0]
    each = jnp.moveaxis(log_decays, 0, -1)
    past = lax.broadcast_to_rank(jnp.tril(jnp.ones((time, time), bool)), each.ndim + 1)
    if resets is None:
        return Chunk(jnp.cumsum(each, -1), past, lax.broadcast_to_rank(jnp.ones(time, bool), each.ndim))
    segments = jnp.moveaxis(jnp.cumsum(resets.astype(jnp.int32), 0), 0, -1)[..., None, :]  # (*B, 1, T)
    seen = past & (segments[..., :, None] == segments[..., None, :])
    # Not a difference of sums from the first step on, whose gradient would cross a reset, if only by what is rounded.
    total = jnp.sum(jnp.where(seen, each[..., None, :], jnp.zeros((), each.dtype)), -1)
    return Chunk(total, seen, segments == 0)


def heads_first(a: jax.Array) -> jax.Array:
    """``(T, *B, heads, D)`` as ``(*B, heads, T, D)``."""
    return jnp.moveaxis(a, 0, -2)


def steps_first(a: jax.Array) -> jax.Array:
    """``(*B, heads, T, D)`` as ``(T, *B, heads, D)``."""
    return jnp.moveaxis(a, -2, 0)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of the last two axes, with the others as a batch."""
    lead = tuple(range(a.ndim - 2))
    return lax.dot_general(a, b, (((a.ndim - 1,), (b.ndim - 2,)), (lead, lead)))


def outer(k: jax.Array, u: jax.Array) -> jax.Array:
    """``k u^T``: ``(..., K)`` and ``(..., V)`` to ``(..., K, V)``."""
    return k[..., :, None] * u[..., None, :]


def apply(state: jax.Array, q: jax.Array) -> jax.Array:
    """``S^T q``: ``(..., K, V)`` and ``(..., K)`` to ``(..., V)``."""
    return matmul(q[..., None, :], state)[..., 0, :]


def run_chunk(chunk: Chunk, state: jax.Array, q: jax.Array, k: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk and what all its steps put out, of ``q``, ``k``, ``u`` each ``(*B, heads, T, ·)``."""
    start = chunk.from_start()
    y = matmul(matmul(q, jnp.swapaxes(k, -1, -2)) * chunk.decays(), u) + start[..., None] * matmul(q, state)
    left = chunk.decays()[..., -1, :, None]  # of what each step adds, at the end of the chunk
    return start[..., -1, None, None] * state + matmul(jnp.swapaxes(k * left, -1, -2), u), y


def split(z: jax.Array, sizes: tuple[int, ...]) -> list[Any]:
    """The last axis cut into parts of the given sizes."""
    cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(z, cuts, -1)


def in_heads(z: jax.Array, heads: int) -> jax.Array:
    """``(..., heads * D)`` as ``(..., heads, D)``."""
    return z.reshape(*z.shape[:-1], heads, z.shape[-1] // heads)


def joined(z: jax.Array) -> jax.Array:
    """``(..., heads, D)`` as ``(..., heads * D)``."""
    return z.reshape(*z.shape[:-2], z.shape[-2] * z.shape[-1])
