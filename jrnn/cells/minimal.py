"""minGRU and minLSTM: the gates of a GRU and an LSTM, without what makes them depend on the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn.cells.linear import ForgetGateCell

__all__ = ["min_gru", "min_lstm"]


def positive(x: jax.Array) -> jax.Array:
    """``g`` of the paper: a candidate that is positive, x + 1/2 from zero on and the logistic function below it."""
    return jnp.where(x >= 0, x + jnp.array(0.5, x.dtype), jax.nn.sigmoid(x))


@dataclass(frozen=True, repr=False)
class MinGRU(ForgetGateCell):
    """See `min_gru`."""

    gate_names: ClassVar[tuple[str, ...]] = ("z", "n")
    forget_signs: ClassVar[Mapping[str, int]] = {"z": -1}
    emits = "h"

    _constructor = "min_gru"

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, n = self.gate_inputs(params, xs)
        return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * positive(n)


@dataclass(frozen=True, repr=False)
class MinLSTM(ForgetGateCell):
    """See `min_lstm`."""

    gate_names: ClassVar[tuple[str, ...]] = ("i", "f", "n")
    forget_signs: ClassVar[Mapping[str, int]] = {"f": 1, "i": -1}
    emits = "h"

    _constructor = "min_lstm"

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        i, f, n = self.gate_inputs(params, xs)
        # f / (f + i) = logistic(log f - log i), where neither gate underflows.
        more = jax.nn.softplus(-i) - jax.nn.softplus(-f)
        return jax.nn.sigmoid(more), jax.nn.sigmoid(-more) * positive(n)


def min_gru(
    hidden: int,
    *,
    forget_bias: float | initializers.Initializer = 0.0,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> MinGRU:
    """minGRU (Feng et al. 2024, "Were RNNs all we needed?"): a GRU whose gates depend on the input alone.

    ``z = σ(x W_z + b_z)``, ``n = g(x W_n + b_n)``, ``h = (1 - z) * h + z * n``, with ``g(x) = x + 1/2`` for x ≥ 0 and
    ``σ(x)`` below: the candidate of the paper's log-space form, which is positive. The recurrence itself needs no
    logarithms here, since ``1 - z`` is in (0, 1) and nothing divides by products of it (see `jrnn.linear_scan`).

    Args:
      hidden: H.
      forget_bias: subtracted from z's part of ``b`` at initialisation, so that a step whose input is zero multiplies
        ``h`` by ``σ(forget_bias)``. A number, or an initialiser of one for each unit. With zero, as in the paper, a
        memory lasts for about two steps before training; ``jrnn.initializers.chrono(T)`` spreads memories over up to T
        steps, which long sequences need.
      input_init, bias_init: initialisers of ``w_ih`` and ``b``, drawn gate by gate.

    Parameters: ``w_ih (F, 2H)``, ``b (2H,)``, in the order z, n.

    >>> cell = jrnn.min_gru(4)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.h.shape
    ((5, 2, 4), (2, 4))
    """
    return MinGRU(hidden, forget_bias=forget_bias, input_init=input_init, bias_init=bias_init)


def min_lstm(
    hidden: int,
    *,
    forget_bias: float | initializers.Initializer = 0.0,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> MinLSTM:
    """minLSTM (Feng et al. 2024): input and forget gates of the input alone, which sum to one.

    ``i = σ(x W_i + b_i)``, ``f = σ(x W_f + b_f)``, ``n = g(x W_n + b_n)``, ``h = (f * h + i * n) / (f + i)``, with g as
    for `min_gru`. ``f / (f + i)`` is computed as ``σ(log f - log i)``, so that both gates may underflow.

    Args:
      hidden: H.
      forget_bias: as for `min_gru`; added to f's part of ``b`` and subtracted from i's.
      input_init, bias_init: initialisers of ``w_ih`` and ``b``, drawn gate by gate.

    Parameters: ``w_ih (F, 3H)``, ``b (3H,)``, in the order i, f, n.

    >>> cell = jrnn.min_lstm(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 4)
    """
    return MinLSTM(hidden, forget_bias=forget_bias, input_init=input_init, bias_init=bias_init)
