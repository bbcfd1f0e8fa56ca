"""The simple recurrent unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn.cells.base import check_features, check_named, exported, product, vector
from jrnn.cells.linear import ForgetGateCell, form, parameter_dtype

__all__ = ["SRUState", "sru"]


@exported
class SRUState(NamedTuple):
    """``c (*B, H)``.

    >>> jrnn.sru(4).initial_state(jrnn.sru(4).init(jax.random.key(0), 3), (2,)).c.shape
    (2, 4)
    """

    c: jax.Array


@dataclass(frozen=True, repr=False)
class SRU(ForgetGateCell):
    """See `sru`."""

    activation: activations.Activation = field(default="tanh", kw_only=True)

    gate_names: ClassVar[tuple[str, ...]] = ("c", "f", "r")
    forget_signs: ClassVar[Mapping[str, int]] = {"f": 1}

    _constructor = "sru"

    def __post_init__(self) -> None:
        super().__post_init__()
        activations.resolve(self.activation)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        k_gates, k_skip = jax.random.split(key)
        params = super().init(k_gates, in_features)
        params["b"] = params["b"][self.hidden :]  # the candidate has none
        if in_features != self.hidden:
            params["w_skip"] = initializers.draw(self.input_init, k_skip, (in_features, self.hidden))
        return params

    def state_form(self, params: Any) -> SRUState:
        return SRUState(form((self.hidden,), parameter_dtype(params)))

    def check(self, params: Any, x: Any) -> None:
        inputs = jnp.shape(params["w_ih"])[:1] if isinstance(params, Mapping) and "w_ih" in params else (x.shape[-1],)
        skip = {} if inputs == (self.hidden,) else {"w_skip": (*inputs, self.hidden)}
        check_named(self, params, {"w_ih": (*inputs, 3 * self.hidden), "b": (2 * self.hidden,), **skip})
        check_features(x, params["w_ih"], "xs", self)

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        candidate, f = jnp.split(product(xs, params["w_ih"][:, : 2 * self.hidden]), 2, -1)
        f = f + vector(params["b"][: self.hidden], f)
        return jax.nn.sigmoid(f), jax.nn.sigmoid(-f) * candidate

    def readout(self, params: Any, h: jax.Array, xs: jax.Array) -> jax.Array:
        r = product(xs, params["w_ih"][:, 2 * self.hidden :])
        r = r + vector(params["b"][self.hidden :], r)
        skip = product(xs, params["w_skip"]) if "w_skip" in params else xs.astype(h.dtype)
        return jax.nn.sigmoid(r) * activations.resolve(self.activation)(h) + jax.nn.sigmoid(-r) * skip


def sru(
    hidden: int,
    *,
    forget_bias: float | initializers.Initializer = 0.0,
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> SRU:
    """Simple recurrent unit (Lei, Zhang and Artzi 2017, "Training RNNs as fast as CNNs").

    ``f = σ(x W_f + b_f)``, ``r = σ(x W_r + b_r)``, ``c = f * c + (1 - f) * x W_c``, ``y = r * g(c) + (1 - r) * x``.
    Where F is not H, ``x W_skip`` is in the place of the last ``x``. These are the equations of the paper's first
    version, which are linear in the state; the later one (2018) lets both gates see ``c``.

    Args:
      hidden: H.
      forget_bias: added to f's part of ``b`` at initialisation, as for `min_gru`; zero in the authors' code.
      activation: g, "tanh", "linear" or another name of `jrnn.activations`, or a module-level function.
      input_init, bias_init: initialisers of the weights and of ``b``, drawn gate by gate.

    Parameters: ``w_ih (F, 3H)`` in the order c, f, r; ``b (2H,)`` in the order f, r; where F is not H, ``w_skip (F,
    H)``. The state is ``SRUState(c)``.

    >>> cell = jrnn.sru(4)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.c.shape
    ((5, 2, 4), (2, 4))
    """
    return SRU(hidden, forget_bias=forget_bias, activation=activation, input_init=input_init, bias_init=bias_init)
