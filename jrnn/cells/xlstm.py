"""xLSTM's cells: exponential gates, with a stabiliser; a vector (sLSTM) or a matrix (mLSTM) for a memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn._core.checks import batch_axes, divides, positive_int
from jrnn.cells import matrix
from jrnn.cells.base import Cell, check_features, check_projection, exported, product, stable, vector
from jrnn.cells.blocks import BlockCell
from jrnn.cells.matrix import NEVER

__all__ = ["MLSTMState", "SLSTMState", "mlstm", "slstm"]


@exported
class SLSTMState(NamedTuple):
    """State of an sLSTM, each ``(*B, H)``: the output ``h``, the memory ``c``, its norm ``n`` and the stabiliser ``m``.

    >>> jrnn.slstm(4).initial_state(jrnn.slstm(4).init(jax.random.key(0), 3), (2,)).n.shape
    (2, 4)
    """

    h: jax.Array
    c: jax.Array
    n: jax.Array
    m: jax.Array


@exported
class MLSTMState(NamedTuple):
    """State of an mLSTM: for each head the memory ``c (*B, heads, D, D)``, its norm ``n (*B, heads, D)``, and ``m``.

    ``m (*B, heads)`` is the stabiliser: the true c and n are those of the state times ``exp(m)``.

    >>> cell = jrnn.mlstm(6, heads=2)
    >>> cell.initial_state(cell.init(jax.random.key(0), 5), ()).c.shape
    (2, 3, 3)
    """

    c: jax.Array
    n: jax.Array
    m: jax.Array


@dataclass(frozen=True, repr=False)
class SLSTM(BlockCell):
    """See `slstm`."""

    gate_names: ClassVar[tuple[str, ...]] = ("i", "f", "z", "o")
    state_type: ClassVar[Any] = SLSTMState
    elementwise: ClassVar[bool | None] = True
    additive = True
    blocks_name = "heads"

    _constructor = "slstm"

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments, options = super()._constructor_arguments()
        return arguments, {**{name: value for name, value in options.items() if name != "blocks"}, "heads": self.blocks}

    def init_bias(self, key: jax.Array) -> jax.Array:
        b = super().init_bias(key)
        forget = jnp.tile(jnp.linspace(3.0, 6.0, self._size, dtype=jnp.float32), self.blocks)
        return b.at[self.hidden : 2 * self.hidden].add(forget)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        i, f, z, o = (a + b for a, b in zip(u, v, strict=True))
        kept = jax.nn.log_sigmoid(f) + state.m
        # An empty memory sets no scale: the first step takes that of its own gate, or it could vanish beside it.
        m = jnp.where(state.n == 0, i, jnp.maximum(kept, i))
        write, keep = jnp.exp(i - m), jnp.exp(jnp.where(state.n == 0, jnp.full((), NEVER, m.dtype), kept - m))
        c = keep * state.c + write * jnp.tanh(z)
        n = keep * state.n + write
        return SLSTMState(jax.nn.sigmoid(o) * (c / n), c, n, m)


def slstm(
    hidden: int,
    *,
    heads: int = 1,
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> SLSTM:
    """sLSTM of xLSTM (Beck et al. 2024): an LSTM with an exponential input gate and a memory that is normalised::

        i, f, z, o = x W + h U + b               U acts within each head
        m' = max(log sigmoid(f) + m, i)          the stabiliser, which cancels out
        c = exp(log sigmoid(f) + m - m') c + exp(i - m') tanh(z)
        n = exp(log sigmoid(f) + m - m') n + exp(i - m')
        h = sigmoid(o) c / n

    At the first step ``m' = i``, as in the authors' code.

    Args:
      hidden: H, the number of units.
      heads: a number that divides ``hidden``: units are fed back to those of their own head.
      input_init, recurrent_init, bias_init: initialisers; ``w_hh`` is drawn head by head and gate by gate. To the
        forget gate's part of ``b`` numbers from 3 to 6 are added, evenly spaced over the units of a head.

    Parameters: ``w_ih (F, 4H)``, ``w_hh (heads, D, 4D)`` with ``D = H / heads``, ``b (4H,)``, gates in the order i, f,
    z, o.

    Raises:
      ValueError: if ``heads`` does not divide ``hidden``.

    >>> cell = jrnn.slstm(8, heads=2)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> params["w_hh"].shape, jrnn.unroll(cell, params, jnp.ones((5, 2, 3)))[1].shape
    ((2, 4, 16), (5, 2, 8))
    """
    return SLSTM(hidden, heads, input_init=input_init, recurrent_init=recurrent_init, bias_init=bias_init)


@dataclass(frozen=True, repr=False)
class MLSTM(Cell):
    """See `mlstm`."""

    hidden: int
    heads: int = field(default=1, kw_only=True)
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    uses_key = False

    _constructor = "mlstm"

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        divides(self.heads, self.hidden, "heads", "hidden")
        initializers.resolve(self.input_init, "input_init")
        initializers.resolve(self.bias_init, "bias_init")

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (*(self.hidden,) * 4, self.heads, self.heads)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        k_ih, k_b = jax.random.split(key)
        keys = jax.random.split(k_ih, len(self._sizes))
        parts = [
            initializers.draw(self.input_init, k, (in_features, n)) for k, n in zip(keys, self._sizes, strict=True)
        ]
        b = initializers.draw(self.bias_init, k_b, (sum(self._sizes),))
        return {
            "w_ih": jnp.concatenate(parts, -1),
            "b": b.at[-self.heads :].add(jnp.linspace(3.0, 6.0, self.heads, dtype=jnp.float32)),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> MLSTMState:
        size, dtype = self.hidden // self.heads, stable(params["w_ih"].dtype)
        shape = (*batch_axes(batch_shape), self.heads)
        return MLSTMState(
            jnp.zeros((*shape, size, size), dtype), jnp.zeros((*shape, size), dtype), jnp.zeros(shape, dtype)
        )

    def out_features(self, in_features: Any) -> int:
        return self.hidden

    def check(self, params: Any, x: Any) -> None:
        width = sum(self._sizes)
        check_projection(self, params, width, {"b": (width,)})
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> dict[str, jax.Array]:
        u = product(xs, params["w_ih"])
        q, k, v, o, i, f = matrix.split(u + vector(params["b"], u), self._sizes)
        q, k, v = (matrix.in_heads(a, self.heads) for a in (q, k, v))
        k = k * (self.hidden // self.heads) ** -0.5
        return {"q": q, "k": k, "v": v, "o": jax.nn.sigmoid(o), "i": i, "l": jax.nn.log_sigmoid(f)}

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        m = jnp.maximum(p["l"] + state.m, p["i"])
        keep, write = jnp.exp(p["l"] + state.m - m)[..., None], jnp.exp(p["i"] - m)[..., None]
        k = write * p["k"]
        c = keep[..., None] * state.c + matrix.outer(k, p["v"])
        n = keep * state.n + k
        share = jnp.sum(n * p["q"], -1)
        return MLSTMState(c, n, m), _output(p, matrix.apply(c, p["q"]), share, m)

    def chunk(self, params: Any, state: Any, p: Any, valid: Any, resets: Any) -> tuple[Any, jax.Array]:
        log_decays, i = matrix.neutral(valid, p["l"]), matrix.neutral(valid, p["i"], NEVER)
        chunk = matrix.chunk_of(log_decays, resets)
        q, k, v = (matrix.heads_first(p[name]) for name in ("q", "k", "v"))
        low = jnp.full((), NEVER, i.dtype)
        # The stabiliser at t is the largest exponent of what is added up there: of each step's gate, and of the state
        # before, from its own stabiliser, or from zero after a reset.
        added = jnp.where(chunk.seen, chunk.exponents() + jnp.moveaxis(i, 0, -1)[..., None, :], low)
        zero = jnp.zeros((), i.dtype)
        floor = chunk.total + jnp.where(chunk.start, state.m[..., None], zero)
        before = jnp.where(chunk.start, floor, low)
        m = jnp.maximum(jnp.max(added, -1), floor)
        weights = jnp.exp(added - m[..., None])
        start = jnp.exp(before - m)[..., None]
        scores = matrix.matmul(q, jnp.swapaxes(k, -1, -2)) * weights
        y = matrix.matmul(scores, v) + start * matrix.matmul(q, state.c)
        share = jnp.sum(scores, -1) + start[..., 0] * matrix.matmul(q, state.n[..., None])[..., 0]
        left, kept = weights[..., -1, :, None], start[..., -1, :]
        c = kept[..., None] * state.c + matrix.matmul(jnp.swapaxes(k * left, -1, -2), v)
        n = kept * state.n + jnp.sum(k * left, -2)
        y, share, m_steps = matrix.steps_first(y), jnp.moveaxis(share, -1, 0), jnp.moveaxis(m, -1, 0)
        return MLSTMState(c, n, m[..., -1]), _output(p, y, share, m_steps)


def _output(p: Any, y: jax.Array, share: jax.Array, m: jax.Array) -> jax.Array:
    """``o (C^T q) / max(|n . q|, 1)``, of C and n over ``exp(m)``."""
    # Bounded, since float32 ends at exp(88): there the output is nothing, and a derivative of infinity would be NaN.
    floor = jnp.exp(jnp.minimum(-m, jnp.full((), 80.0, m.dtype)))
    normed = y / jnp.maximum(jnp.abs(share), floor)[..., None]
    return p["o"] * matrix.joined(normed)


def mlstm(
    hidden: int,
    *,
    heads: int = 1,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> MLSTM:
    """mLSTM of xLSTM (Beck et al. 2024): a matrix for a memory in each head, and no recurrent weights::

        q, k, v, o, i, f = x W + b               k divided by sqrt(D); i and f a number for each head
        m' = max(log sigmoid(f) + m, i)          the stabiliser, which cancels out
        c = exp(log sigmoid(f) + m - m') c + exp(i - m') k v^T
        n = exp(log sigmoid(f) + m - m') n + exp(i - m') k
        y = sigmoid(o) (c^T q) / max(|n . q|, exp(-m'))

    ``backend="chunkwise"`` runs a chunk of steps at once, as products of matrices.

    Args:
      hidden: H, features of q, k, v and y, D = H / heads for each head.
      heads: a number that divides ``hidden``.
      input_init, bias_init: initialisers of the parts of ``w_ih``, and of ``b``, to whose part of f numbers from 3 to 6
        are added, evenly spaced over the heads.

    Parameters: ``w_ih (F, 4H + 2 heads)``, ``b (4H + 2 heads,)`` in the order q, k, v, o, i, f.

    Raises:
      ValueError: if ``heads`` does not divide ``hidden``.

    >>> cell = jrnn.mlstm(8, heads=2)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 8)
    """
    return MLSTM(hidden, heads=heads, input_init=input_init, bias_init=bias_init)
