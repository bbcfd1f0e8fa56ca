"""The NARX network: a network over its own past outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core.checks import batch_axes, positive_int
from jrnn.cells.base import Cell, check_features, check_named, exported, product, stable, vector

__all__ = ["NARXState", "narx"]


@exported
class NARXState(NamedTuple):
    """State of a NARX network: what it put out, and what past inputs have added to the hidden layer of later steps.

    ``outputs (*B, D, out)``, the last D outputs, the newest first; ``pending (*B, window - 1, H)``.

    >>> cell = jrnn.narx(8, 2, delays=(1, 3))
    >>> cell.initial_state(cell.init(jax.random.key(0), 3), ()).outputs.shape
    (3, 2)
    """

    outputs: jax.Array
    pending: jax.Array


@dataclass(frozen=True, repr=False)
class NARX(Cell):
    """See `narx`."""

    hidden: int
    out: int
    delays: tuple[int, ...] = field(kw_only=True)
    window: int = 1
    activation: activations.Activation = "tanh"
    out_activation: activations.Activation = "linear"
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    recurrent_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    uses_key = False

    _constructor = "narx"

    def __post_init__(self) -> None:
        for name in ("hidden", "out", "window"):
            positive_int(getattr(self, name), name)
        if not isinstance(self.delays, tuple) or not self.delays:
            raise TypeError(f"delays: expected a positive int or a tuple of different ones, got {self.delays!r}")
        for delay in self.delays:
            positive_int(delay, "delays")
        if len(set(self.delays)) < len(self.delays):
            raise ValueError(f"delays: expected different delays, got {self.delays}")
        activations.resolve(self.activation)
        activations.resolve(self.out_activation, "out_activation")
        for name in ("input_init", "recurrent_init", "bias_init"):
            initializers.resolve(getattr(self, name), name)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        k_ih, k_hh, k_ho, k_b, k_bo = jax.random.split(key, 5)
        # Fans are those of all delays together, since a hidden unit sums over them.
        w_ih = initializers.draw(self.input_init, k_ih, (self.window * in_features, self.hidden))
        return {
            "w_ih": w_ih.reshape(self.window, in_features, self.hidden),
            "w_hh": initializers.draw(self.recurrent_init, k_hh, (len(self.delays) * self.out, self.hidden)),
            "b": initializers.draw(self.bias_init, k_b, (self.hidden,)),
            "w_ho": initializers.draw(self.input_init, k_ho, (self.hidden, self.out)),
            "b_o": initializers.draw(self.bias_init, k_bo, (self.out,)),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> NARXState:
        batch, dtype = batch_axes(batch_shape), stable(params["w_hh"].dtype)
        return NARXState(
            jnp.zeros((*batch, max(self.delays), self.out), dtype),
            jnp.zeros((*batch, self.window - 1, self.hidden), dtype),
        )

    def out_features(self, in_features: Any) -> int:
        return self.out

    def check(self, params: Any, x: Any) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "w_hh": (len(self.delays) * self.out, self.hidden),
            "b": (self.hidden,),
            "w_ho": (self.hidden, self.out),
            "b_o": (self.out,),
        }
        check_named(self, params, shapes)
        w_ih = jnp.shape(params["w_ih"]) if "w_ih" in params else ()
        if len(w_ih) != 3 or (w_ih[0], w_ih[2]) != (self.window, self.hidden):
            raise ValueError(
                f"params: expected w_ih ({self.window}, F, {self.hidden}) for {self!r}, got {w_ih}; "
                f"make them with {self!r}.init(key, in_features)"
            )
        check_features(x, params["w_ih"], "xs", self, axis=1)

    def project(self, params: Any, xs: jax.Array) -> jax.Array:
        window, inputs, hidden = params["w_ih"].shape
        u = product(xs, params["w_ih"].transpose(1, 0, 2).reshape(inputs, window * hidden))
        return u.reshape(*xs.shape[:-1], window, hidden)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        queue = jnp.pad(state.pending, [*((0, 0) for _ in range(p.ndim - 2)), (0, 1), (0, 0)]) + p
        past = jnp.concatenate([state.outputs[..., delay - 1, :] for delay in self.delays], -1)
        z = queue[..., 0, :] + product(past, params["w_hh"])
        z = activations.resolve(self.activation)(z + vector(params["b"], z))
        o = product(z, params["w_ho"])
        y = activations.resolve(self.out_activation)(o + vector(params["b_o"], o)).astype(state.outputs.dtype)
        outputs = jnp.concatenate([y[..., None, :], state.outputs[..., :-1, :]], -2)
        return NARXState(outputs, queue[..., 1:, :]), y


def narx(
    hidden: int,
    out: int,
    *,
    delays: int | tuple[int, ...],
    window: int = 1,
    activation: activations.Activation = "tanh",
    out_activation: activations.Activation = "linear",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> NARX:
    """Nonlinear autoregressive network with exogenous inputs (Lin et al. 1996), which feeds back delayed outputs::

        z[t] = f(b + sum_k x[t - k] w_ih[k] + [y[t - d] for d in delays] w_hh)    k = 0 … window - 1
        y[t] = g(z[t] w_ho + b_o)

    Inputs and outputs before the first step count as zero. Delays shorten the path of gradients through time.

    Args:
      hidden: H, units of the hidden layer.
      out: features of the output that is fed back.
      delays: the delays at which outputs are fed back; an int D means ``1 … D``.
      window: the number of inputs that a step depends on, its own included.
      activation: f.
      out_activation: g.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih`` and ``w_ho``, of ``w_hh``, and of the biases.

    Parameters: ``w_ih (window, F, H)``, ``w_hh (len(delays) * out, H)``, ``b (H,)``, ``w_ho (H, out)``, ``b_o (out,)``.

    Raises:
      ValueError: if a delay is not positive, or is given twice.

    >>> cell = jrnn.narx(8, 2, delays=3)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1].shape
    (5, 2)
    """
    if isinstance(delays, int):
        positive_int(delays, "delays")
        delays = tuple(range(1, delays + 1))
    return NARX(
        hidden,
        out,
        delays=tuple(delays) if isinstance(delays, list) else delays,
        window=window,
        activation=activation,
        out_activation=out_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
