"""The gated delta rule: a state that decays, and whose value for a key is corrected at each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import initializers
from jrnn._core.checks import batch_axes, divides, positive_int
from jrnn.cells import matrix
from jrnn.cells.base import Cell, check_features, check_projection, exported, product, stable, vector

__all__ = ["DeltaNetState", "gated_delta_net"]


@exported
class DeltaNetState(NamedTuple):
    """State of a gated delta network: ``s (*B, heads, K, H / heads)``, a matrix for each head.

    >>> cell = jrnn.gated_delta_net(8, heads=2, key_features=3)
    >>> cell.initial_state(cell.init(jax.random.key(0), 5), ()).s.shape
    (2, 3, 4)
    """

    s: jax.Array


@dataclass(frozen=True, repr=False)
class GatedDeltaNet(Cell):
    """See `gated_delta_net`."""

    hidden: int
    heads: int = field(default=1, kw_only=True)
    key_features: int | None = None
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)

    uses_key = False

    _constructor = "gated_delta_net"

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        divides(self.heads, self.hidden, "heads", "hidden")
        if self.key_features is not None:
            positive_int(self.key_features, "key_features")
        initializers.resolve(self.input_init, "input_init")

    @property
    def _keys(self) -> int:
        """K, the features of a head's keys."""
        return self.hidden // self.heads if self.key_features is None else self.key_features

    @property
    def _sizes(self) -> tuple[int, ...]:
        keys = self.heads * self._keys
        return keys, keys, self.hidden, self.heads, self.heads

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
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> DeltaNetState:
        shape = (*batch_axes(batch_shape), self.heads, self._keys, self.hidden // self.heads)
        return DeltaNetState(jnp.zeros(shape, stable(params["w_ih"].dtype)))

    def out_features(self, in_features: Any) -> int:
        return self.hidden

    def check(self, params: Any, x: Any) -> None:
        check_projection(self, params, sum(self._sizes), {"b_dt": (self.heads,), "a_log": (self.heads,)})
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> dict[str, jax.Array]:
        q, k, v, beta, dt = matrix.split(product(xs, params["w_ih"]), self._sizes)
        q, k, v = (matrix.in_heads(a, self.heads) for a in (q, k, v))
        dt = jax.nn.softplus(dt + vector(params["b_dt"], dt))
        return {
            "l": -jnp.exp(vector(params["a_log"], dt)) * dt,
            "q": _unit(q) * self._keys**-0.5,
            "k": _unit(k),
            "v": v,
            "beta": jax.nn.sigmoid(beta)[..., None],
        }

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        kept = jnp.exp(p["l"])[..., None, None] * state.s
        u = p["beta"] * (p["v"] - matrix.apply(kept, p["k"]))
        s = kept + matrix.outer(p["k"], u)
        return DeltaNetState(s), matrix.joined(matrix.apply(s, p["q"]))

    def chunk(self, params: Any, state: Any, p: Any, valid: Any, resets: Any) -> tuple[Any, jax.Array]:
        # What the steps add solves a triangular system, since each step corrects what those before it have added:
        #   u_t = beta_t (v_t - exp(L_t) S_0^T k_t - sum_{s < t} exp(L_t - L_s) (k_t . k_s) u_s)
        chunk = matrix.chunk_of(matrix.neutral(valid, p["l"]), resets)
        q, k, v, beta = (matrix.heads_first(a) for a in (p["q"], p["k"], p["v"], matrix.neutral(valid, p["beta"])))
        strict = jnp.tril(jnp.ones((k.shape[-2],) * 2, k.dtype), -1)
        earlier = beta * matrix.matmul(k, jnp.swapaxes(k, -1, -2)) * chunk.decays()
        given = beta * (v - chunk.from_start()[..., None] * matrix.matmul(k, state.s))
        u = matrix.matmul(_inverse(earlier * lax.broadcast_to_rank(strict, earlier.ndim)), given)
        s, y = matrix.run_chunk(chunk, state.s, q, k, u)
        return DeltaNetState(s), matrix.joined(matrix.steps_first(y))


@jax.custom_jvp
def _inverse(below: jax.Array) -> jax.Array:
    """The inverse of ``I + below``, where ``below (..., T, T)`` is zero on the diagonal and above it.

    By forward substitution, a row of all matrices at a time. XLA solves triangular systems on a CPU by a call of LAPACK
    for each matrix, which is slow for many small ones, and far slower where LAPACK's threads wait for each other.
    """
    size = below.shape[-1]
    eye = lax.broadcast_to_rank(jnp.eye(size, dtype=below.dtype), below.ndim)
    row = lambda a, i: lax.dynamic_slice_in_dim(a, i, 1, a.ndim - 2)

    def substitute(i: Any, inverse: jax.Array) -> jax.Array:  # rows before i are right
        found = row(eye, i) - matrix.matmul(row(below, i), inverse)
        return lax.dynamic_update_slice_in_dim(inverse, found, i, inverse.ndim - 2)

    return lax.fori_loop(1, size, substitute, eye - below)


@_inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (below,), (change,) = primals, tangents
    inverse = _inverse(below)
    return inverse, -matrix.matmul(inverse, matrix.matmul(change, inverse))


def _unit(x: jax.Array) -> jax.Array:
    """A vector over its length; zero stays zero."""
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def gated_delta_net(
    hidden: int,
    *,
    heads: int = 1,
    key_features: int | None = None,
    input_init: initializers.Initializer = "glorot_uniform",
) -> GatedDeltaNet:
    """The gated delta rule (Gated DeltaNet; Yang, Kautz and Hatamizadeh 2025), a matrix for a state in each head::

        q, k, v, beta, dt = xs w_ih              for each head q and k (K,), v (V,), beta and dt a number
        q, k = q / |q| / sqrt(K), k / |k|        beta = sigmoid(beta)
        a = exp(-exp(a_log) softplus(dt + b_dt))
        S = a (I - beta k k^T) S + beta k v^T    y = S^T q

    A step multiplies the state by a, and replaces the share beta of the value that the state holds for the key k by v.
    This is the recurrence alone: the block of the paper has convolutions before it, and a norm, a gate and a projection
    after it.

    ``backend="chunkwise"`` runs a chunk of steps at once, as products of matrices and the inverse of a triangular one.

    Args:
      hidden: H, features of v and y, V = H / heads for each head.
      heads: a number that divides ``hidden``.
      key_features: K; None for as many as V.
      input_init: initialiser of the parts of ``w_ih``.

    Parameters: ``w_ih (F, 2 heads K + H + 2 heads)`` in the order q, k, v, beta, dt; ``b_dt`` and ``a_log``
    ``(heads,)``.

    Raises:
      ValueError: if ``heads`` does not divide ``hidden``.

    >>> cell = jrnn.gated_delta_net(8, heads=2)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 8)
    """
    return GatedDeltaNet(hidden, heads=heads, key_features=key_features, input_init=input_init)
