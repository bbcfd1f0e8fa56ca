"""Cells made of ordinary differential equations: coRNN and LEM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core.checks import finite, non_negative_int
from jrnn.cells.affine import WeightedCell
from jrnn.cells.base import check_features, check_projection, exported, product

__all__ = ["CoRNNState", "LEMState", "cornn", "lem"]


@exported
class CoRNNState(NamedTuple):
    """State of a coRNN: ``h (*B, H)``, the positions of the oscillators, and ``z (*B, H)``, their velocities.

    >>> jrnn.cornn(4).initial_state(jrnn.cornn(4).init(jax.random.key(0), 3), (2,)).z.shape
    (2, 4)
    """

    h: jax.Array
    z: jax.Array


@exported
class LEMState(NamedTuple):
    """State of an LEM: ``h (*B, H)``, the output (y in the paper), and ``z (*B, H)``.

    >>> jrnn.lem(4).initial_state(jrnn.lem(4).init(jax.random.key(0), 3), (2,)).z.shape
    (2, 4)
    """

    h: jax.Array
    z: jax.Array


@dataclass(frozen=True, repr=False)
class CoRNN(WeightedCell):
    """See `cornn`."""

    dt: float = 0.042
    gamma: float = 2.7
    epsilon: float = 4.7
    activation: activations.Activation = "tanh"
    recurrent_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)

    state_type: ClassVar[Any] = CoRNNState

    _constructor = "cornn"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.dt, "dt", above=0.0)
        finite(self.gamma, "gamma")
        finite(self.epsilon, "epsilon")
        activations.resolve(self.activation)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_b = jax.random.split(key, 3)
        return {
            "w_ih": initializers.draw(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": initializers.draw(self.recurrent_init, k_hh, (2 * self.hidden, self.hidden)),
            "b": initializers.draw(self.bias_init, k_b, (self.hidden,)),
        }

    def check(self, params: Any, x: Any) -> None:
        shapes = {"w_hh": (2 * self.hidden, self.hidden), "b": (self.hidden,)}
        check_projection(self, params, self.hidden, shapes)
        check_features(x, params["w_ih"], "xs", self)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        force = activations.resolve(self.activation)(
            p + product(jnp.concatenate([state.h, state.z], -1), params["w_hh"])
        )
        z = state.z + self.dt * (force - self.gamma * state.h - self.epsilon * state.z)
        h = state.h + self.dt * z
        return CoRNNState(h, z), h


def cornn(
    hidden: int,
    *,
    dt: float = 0.042,
    gamma: float = 2.7,
    epsilon: float = 4.7,
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> CoRNN:
    """Coupled oscillatory recurrent network (Rusch and Mishra 2021)::

        z = z + dt (tanh(x W_ih + [h, z] W_hh + b) - gamma h - epsilon z)
        h = h + dt z

    The damping uses the velocity before the step, as the authors' code does. The defaults of the three numbers are
    those that they use for sequential digits.

    Args:
      hidden: H, oscillators.
      dt: the time step, positive.
      gamma: the oscillators' squared frequency.
      epsilon: their damping.
      activation: the function written tanh above.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``.

    Parameters: ``w_ih (F, H)``, ``w_hh (2H, H)`` (rows of h, then of z), ``b (H,)``.

    Raises:
      ValueError: if ``dt`` is not positive.

    >>> cell = jrnn.cornn(4)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, bool((state.h == ys[-1]).all())
    ((5, 2, 4), True)
    """
    return CoRNN(
        hidden,
        dt=dt,
        gamma=gamma,
        epsilon=epsilon,
        activation=activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class LEM(WeightedCell):
    """See `lem`."""

    dt: float = 1.0
    activation: activations.Activation = "tanh"
    input_init: initializers.Initializer = field(default="uniform", kw_only=True)
    recurrent_init: initializers.Initializer = field(default="uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="uniform", kw_only=True)

    state_type: ClassVar[Any] = LEMState

    _constructor = "lem"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.dt, "dt", above=0.0)
        activations.resolve(self.activation)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_zh, k_b = jax.random.split(key, 4)
        size = self.hidden

        def gates(init: initializers.Initializer, key: jax.Array, shape: tuple[int, ...], count: int) -> jax.Array:
            return jnp.concatenate([initializers.draw(init, k, shape) for k in jax.random.split(key, count)], -1)

        return {
            "w_ih": gates(self.input_init, k_ih, (in_features, size), 4),
            "w_hh": gates(self.recurrent_init, k_hh, (size, size), 3),
            "w_zh": initializers.draw(self.recurrent_init, k_zh, (size, size)),
            "b": gates(self.bias_init, k_b, (size,), 4),
        }

    def check(self, params: Any, x: Any) -> None:
        size = self.hidden
        shapes = {"w_hh": (size, 3 * size), "w_zh": (size, size), "b": (4 * size,)}
        check_projection(self, params, 4 * size, shapes)
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(super().project(params, xs), 4, -1))

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        function = activations.resolve(self.activation)
        v = jnp.split(product(state.h, params["w_hh"]), 3, -1)
        dt_z, dt_h = self.dt * jax.nn.sigmoid(p[0] + v[0]), self.dt * jax.nn.sigmoid(p[1] + v[1])
        z = (1 - dt_z) * state.z + dt_z * function(p[2] + v[2])
        h = (1 - dt_h) * state.h + dt_h * function(p[3] + product(z, params["w_zh"]))
        return LEMState(h, z), h


def lem(
    hidden: int,
    *,
    dt: float = 1.0,
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "uniform",
    recurrent_init: initializers.Initializer = "uniform",
    bias_init: initializers.Initializer = "uniform",
) -> LEM:
    """Long expressive memory (Rusch et al. 2022), two states with time steps that are learned::

        s = dt sigmoid(x W_s + h U_s + b_s)    r = dt sigmoid(x W_r + h U_r + b_r)
        z = (1 - s) z + s tanh(x W_z + h U_z + b_z)
        h = (1 - r) h + r tanh(x W_h + z W_zh + b_h)

    Args:
      hidden: H, the number of units.
      dt: the largest time step, positive.
      activation: the function written tanh above.
      input_init, recurrent_init, bias_init: initialisers, drawn gate by gate; uniform as in the authors' code.

    Parameters: ``w_ih (F, 4H)`` and ``b (4H,)`` in the order s, r, z, h; ``w_hh (H, 3H)`` in the order s, r, z;
    ``w_zh (H, H)``.

    Raises:
      ValueError: if ``dt`` is not positive.

    >>> cell = jrnn.lem(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 4)
    """
    return LEM(
        hidden,
        dt=dt,
        activation=activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
