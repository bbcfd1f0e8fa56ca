"""Elman and Jordan networks, and IndRNN: one gate, one hidden state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core.checks import batch_axes, non_negative_int, positive_int, prng_key
from jrnn.cells.affine import AffineCell, WeightedCell, check_affine
from jrnn.cells.base import HiddenState, check_features, check_named, product, stable, vector

__all__ = ["elman", "indrnn", "jordan"]


@dataclass(frozen=True, repr=False)
class Elman(AffineCell):
    """See `elman`."""

    activation: activations.Activation = "tanh"

    elementwise: ClassVar[bool | None] = True
    additive = True

    _constructor = "elman"

    def __post_init__(self) -> None:
        super().__post_init__()
        activations.resolve(self.activation)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        return HiddenState(activations.resolve(self.activation)(u.h + v.h))


def elman(
    hidden: int,
    activation: activations.Activation = "tanh",
    *,
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> Elman:
    """Elman's simple recurrent network (Elman 1990): ``h = f(x W_ih + h W_hh + b)``.

    With ``activation="relu", recurrent_init="identity"`` it is the IRNN of Le, Jaitly and Hinton (2015).

    Args:
      hidden: H, the number of units.
      activation: "tanh", "relu", "sigmoid", another name of `jrnn.activations` or a module-level function.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b`` (see `jrnn.initializers`).

    >>> cell = jrnn.elman(4, "relu")
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, state.h.shape
    ((5, 2, 4), (2, 4))
    """
    return Elman(
        hidden,
        activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class Jordan(WeightedCell):
    """See `jordan`."""

    out: int
    activation: activations.Activation = "tanh"
    out_activation: activations.Activation = "linear"

    _constructor = "jordan"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int(self.out, "out")
        activations.resolve(self.activation)
        activations.resolve(self.out_activation, "out_activation")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        prng_key(key)
        k_ih, k_hh, k_ho, k_b, k_bo = jax.random.split(key, 5)
        return {
            "w_ih": initializers.draw(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": initializers.draw(self.recurrent_init, k_hh, (self.out, self.hidden)),
            "b": initializers.draw(self.bias_init, k_b, (self.hidden,)),
            "w_ho": initializers.draw(self.input_init, k_ho, (self.hidden, self.out)),
            "b_o": initializers.draw(self.bias_init, k_bo, (self.out,)),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> HiddenState:
        return HiddenState(jnp.zeros((*batch_axes(batch_shape), self.out), stable(params["w_hh"].dtype)))

    def out_features(self, in_features: Any) -> int:
        return self.out

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.out, self.hidden))
        check_named(self, params, {"w_ho": (self.hidden, self.out), "b_o": (self.out,)})
        check_features(x, params["w_ih"], "xs", self)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        z = activations.resolve(self.activation)(p + product(state.h, params["w_hh"]))
        o = product(z, params["w_ho"])
        y = activations.resolve(self.out_activation)(o + vector(params["b_o"], o)).astype(state.h.dtype)
        return HiddenState(y), y


def jordan(
    hidden: int,
    out: int,
    activation: activations.Activation = "tanh",
    *,
    out_activation: activations.Activation = "linear",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> Jordan:
    """Jordan's network (Jordan 1986), which feeds back its output instead of its hidden layer.

    ``z = f(x W_ih + y W_hh + b)``, ``y = g(z W_ho + b_o)``; the state's ``h`` is the last output ``y (*B, out)``.

    Args:
      hidden: H, units of the hidden layer.
      out: features of the output that is fed back.
      activation: f.
      out_activation: g.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih`` and ``w_ho``, of ``w_hh``, and of both biases.

    Parameters: ``w_ih (F, H)``, ``w_hh (out, H)``, ``b (H,)``, ``w_ho (H, out)``, ``b_o (out,)``.

    >>> cell = jrnn.jordan(8, 2)
    >>> state, ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
    >>> ys.shape, bool((state.h == ys[-1]).all())
    ((5, 2), True)
    """
    return Jordan(
        hidden,
        out,
        activation,
        out_activation=out_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


_UNIFORM = initializers.uniform(1.0)


@dataclass(frozen=True, repr=False)
class IndRNN(WeightedCell):
    """See `indrnn`."""

    activation: activations.Activation = "relu"
    recurrent_init: initializers.Initializer = field(default=_UNIFORM, kw_only=True)

    _constructor = "indrnn"

    def __post_init__(self) -> None:
        super().__post_init__()
        activations.resolve(self.activation)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        prng_key(key)
        k_ih, k_hh, k_b = jax.random.split(key, 3)
        return {
            "w_ih": initializers.draw(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": initializers.draw(self.recurrent_init, k_hh, (self.hidden,)),
            "b": initializers.draw(self.bias_init, k_b, (self.hidden,)),
        }

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.hidden,))
        check_features(x, params["w_ih"], "xs", self)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        h = activations.resolve(self.activation)(p + vector(params["w_hh"], p) * state.h)
        return HiddenState(h), h


def indrnn(
    hidden: int,
    activation: activations.Activation = "relu",
    *,
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = _UNIFORM,
    bias_init: initializers.Initializer = "zeros",
) -> IndRNN:
    """Independently recurrent network (Li et al. 2018): ``h = f(x W_ih + w_hh * h + b)``.

    ``w_hh (H,)`` is a vector, so that no unit depends on another. It starts uniform in [-1, 1). The paper bounds
    ``|w_hh|`` by ``gamma ** (1/T)``: for this use ``recurrent_init=jrnn.initializers.uniform(bound)``.

    Args:
      hidden: H, the number of units.
      activation: f.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b`` (see `jrnn.initializers`).

    Parameters: ``w_ih (F, H)``, ``w_hh (H,)``, ``b (H,)``. The state is `HiddenState`, and the output is ``h (*B, H)``.

    >>> cell = jrnn.indrnn(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> params["w_hh"].shape, jrnn.unroll(cell, params, jnp.ones((5, 3)))[1].shape
    ((4,), (5, 4))
    """
    return IndRNN(
        hidden,
        activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
