"""The quasi-recurrent network: gates by a convolution over the last inputs, and a pooling that is linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn._core.checks import positive_int
from jrnn.cells.base import exported
from jrnn.cells.linear import ForgetGateCell, form, parameter_dtype

__all__ = ["QRNNState", "qrnn"]

Pooling = Literal["f", "fo", "ifo"]


@exported
class QRNNState(NamedTuple):
    """``c (*B, H)`` and ``past (*B, window - 1, F)``, the inputs before this one, the oldest first.

    >>> jrnn.qrnn(4).initial_state(jrnn.qrnn(4).init(jax.random.key(0), 3), (2,)).past.shape
    (2, 1, 3)
    """

    c: jax.Array
    past: jax.Array


@dataclass(frozen=True, repr=False)
class QRNN(ForgetGateCell):
    """See `qrnn`."""

    window: int = 2
    pooling: Pooling = "fo"

    forget_signs: ClassVar[Mapping[str, int]] = {"f": 1, "i": -1}

    _constructor = "qrnn"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int(self.window, "window")
        if self.pooling not in ("f", "fo", "ifo"):
            raise ValueError(f'pooling: expected "f", "fo" or "ifo", got {self.pooling!r}')

    @property
    def gate_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"f": ("z", "f"), "fo": ("z", "f", "o"), "ifo": ("z", "f", "i", "o")}[self.pooling]

    def state_form(self, params: Any) -> QRNNState:
        dtype, past = parameter_dtype(params), (self.window - 1, params["w_ih"].shape[0] // self.window)
        return QRNNState(form((self.hidden,), dtype), form(past, dtype))

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.pooling == "ifo":
            z, f, i = self.gate_inputs(params, xs, "z", "f", "i")
            return jax.nn.sigmoid(f), jax.nn.sigmoid(i) * jnp.tanh(z)
        z, f = self.gate_inputs(params, xs, "z", "f")
        return jax.nn.sigmoid(f), jax.nn.sigmoid(-f) * jnp.tanh(z)

    def readout(self, params: Any, h: jax.Array, xs: jax.Array) -> jax.Array:
        return h if self.pooling == "f" else jax.nn.sigmoid(*self.gate_inputs(params, xs, "o")) * h


def qrnn(
    hidden: int,
    window: int = 2,
    *,
    pooling: Pooling = "fo",
    forget_bias: float | initializers.Initializer = 0.0,
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> QRNN:
    """Quasi-recurrent network (Bradbury et al. 2017): gates of the last ``window`` inputs, linear in the state.

    With ``X`` the inputs of the last steps side by side, ``z = tanh(X W_z + b_z)``, ``f = σ(X W_f + b_f)``, ``o = σ(X
    W_o + b_o)``:

    - "f" pooling: ``c = f * c + (1 - f) * z``, ``y = c``
    - "fo" pooling: the same ``c``, ``y = o * c``
    - "ifo" pooling: ``c = f * c + i * z``, ``y = o * c``, with ``i = σ(X W_i + b_i)``

    Inputs of steps before the first, and before a reset, count as zeros; a step that is not valid is no step.

    Args:
      hidden: H.
      window: how many steps the gates see, their own included.
      pooling: one of the three.
      forget_bias: added to f's part of ``b`` at initialisation and subtracted from i's, as for `min_gru`; zero in the
        authors' code.
      input_init, bias_init: initialisers of ``w_ih`` and ``b``, drawn gate by gate.

    Parameters: ``w_ih (window * F, G*H)``, the weights of the oldest input first, and ``b (G*H,)``; gates in the order
    z, f, i, o, as many as there are. The state is ``QRNNState(c, past)``.

    >>> cell = jrnn.qrnn(4, window=3)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.c.shape, state.past.shape
    ((5, 2, 4), (2, 4), (2, 2, 3))
    """
    return QRNN(hidden, window, pooling, forget_bias=forget_bias, input_init=input_init, bias_init=bias_init)
