"""Mamba-2's recurrence: a state-space model whose decay is one number a head and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn._core.checks import batch_axes, divides, positive_int
from jrnn.cells import matrix
from jrnn.cells.base import Cell, check_features, check_projection, exported, product, stable, vector

__all__ = ["SSDState", "ssd"]


@exported
class SSDState(NamedTuple):
    """State of Mamba-2's recurrence: ``s (*B, heads, N, H / heads)``, a matrix for each head.

    >>> cell = jrnn.ssd(8, heads=2, state=3)
    >>> cell.initial_state(cell.init(jax.random.key(0), 5), ()).s.shape
    (2, 3, 4)
    """

    s: jax.Array


@dataclass(frozen=True, repr=False)
class SSD(Cell):
    """See `ssd`."""

    hidden: int
    heads: int = field(default=1, kw_only=True)
    state: int = 16
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)

    uses_key = False

    _constructor = "ssd"

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        divides(self.heads, self.hidden, "heads", "hidden")
        positive_int(self.state, "state")
        initializers.resolve(self.input_init, "input_init")

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.hidden, self.state, self.state, self.heads

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        k_ih, k_a, k_dt = jax.random.split(key, 3)
        keys = jax.random.split(k_ih, len(self._sizes))
        parts = [
            initializers.draw(self.input_init, k, (in_features, n)) for k, n in zip(keys, self._sizes, strict=True)
        ]
        dt = jnp.exp(jax.random.uniform(k_dt, (self.heads,), jnp.float32, jnp.log(1e-3), jnp.log(0.1)))
        return {
            "w_ih": jnp.concatenate(parts, -1),
            "b_dt": dt + jnp.log(-jnp.expm1(-dt)),  # the softplus of which is dt
            "a_log": jnp.log(jax.random.uniform(k_a, (self.heads,), jnp.float32, 1.0, 16.0)),
            "d": jnp.ones(self.heads, jnp.float32),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> SSDState:
        shape = (*batch_axes(batch_shape), self.heads, self.state, self.hidden // self.heads)
        return SSDState(jnp.zeros(shape, stable(params["w_ih"].dtype)))

    def out_features(self, in_features: Any) -> int:
        return self.hidden

    def check(self, params: Any, x: Any) -> None:
        per_head = (self.heads,)
        check_projection(self, params, sum(self._sizes), {"b_dt": per_head, "a_log": per_head, "d": per_head})
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> dict[str, jax.Array]:
        x, k, q, dt = matrix.split(product(xs, params["w_ih"]), self._sizes)
        x = matrix.in_heads(x, self.heads)
        dt = jax.nn.softplus(dt + vector(params["b_dt"], dt))
        many = (*k.shape[:-1], self.heads, self.state)
        return {
            "l": -jnp.exp(vector(params["a_log"], dt)) * dt,
            "k": jnp.broadcast_to(k[..., None, :], many),
            "q": jnp.broadcast_to(q[..., None, :], many),
            "u": dt[..., None] * x,
            "skip": vector(params["d"], dt)[..., None] * x,
        }

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        s = jnp.exp(p["l"])[..., None, None] * state.s + matrix.outer(p["k"], p["u"])
        return SSDState(s), matrix.joined(matrix.apply(s, p["q"]) + p["skip"])

    def chunk(self, params: Any, state: Any, p: Any, valid: Any, resets: Any) -> tuple[Any, jax.Array]:
        q, k, u = (matrix.heads_first(a) for a in (p["q"], p["k"], matrix.neutral(valid, p["u"])))
        s, y = matrix.run_chunk(matrix.chunk_of(matrix.neutral(valid, p["l"]), resets), state.s, q, k, u)
        return SSDState(s), matrix.joined(matrix.steps_first(y) + p["skip"])


def ssd(
    hidden: int, *, heads: int = 1, state: int = 16, input_init: initializers.Initializer = "glorot_uniform"
) -> SSD:
    """The recurrence of Mamba-2 (state-space duality; Dao and Gu 2024), a matrix for a state in each head::

        x, k, q, dt = xs w_ih            x (heads, P), k and q (N,), shared by the heads; dt a number for each
        dt = softplus(dt + b_dt)         a = exp(-exp(a_log) dt)
        S = a S + dt k x^T               y = S^T q + d x

    k and q are B and C in the paper. This is the recurrence alone: the block of the paper has a convolution over x, k
    and q before it, and a gate, a norm and a projection after it. The output has H features.

    ``backend="chunkwise"`` runs a chunk of steps at once, as products of matrices.

    Args:
      hidden: H, features of x and y, P = H / heads for each head.
      heads: a number that divides ``hidden``.
      state: N, the size of the state for each feature.
      input_init: initialiser of the parts of ``w_ih``.

    Parameters: ``w_ih (F, H + 2N + heads)`` in the order x, k, q, dt; ``b_dt``, ``a_log`` and ``d`` ``(heads,)``,
    drawn as in the paper: decay rates uniform in [1, 16), dt between 0.001 and 0.1.

    Raises:
      ValueError: if ``heads`` does not divide ``hidden``.

    >>> cell = jrnn.ssd(8, heads=2, state=4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 8)
    """
    return SSD(hidden, heads=heads, state=state, input_init=input_init)
