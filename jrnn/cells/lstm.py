"""The LSTM family: plain, peephole, coupled, projected and layer-normalised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrnn import activations, initializers
from jrnn._core import checks
from jrnn._core.checks import batch_axes, non_negative_int, positive_int, prng_key
from jrnn.cells.affine import AffineCell, WeightedCell, check_affine
from jrnn.cells.base import check_features, check_named, exported, product, stable, vector
from jrnn.cells.norm import layer_norm, layer_norm_gates

__all__ = ["LSTMState", "coupled_lstm", "layer_norm_lstm", "lstm", "peephole_lstm", "projection_lstm"]


@exported
class LSTMState(NamedTuple):
    """State of an LSTM: ``h (*B, H)`` (``(*B, P)`` with a projection), the output, and ``c (*B, H)``, the memory.

    >>> jrnn.lstm(4).initial_state(jrnn.lstm(4).init(jax.random.key(0), 3), (2,)).c.shape
    (2, 4)
    """

    h: jax.Array
    c: jax.Array


@dataclass(frozen=True, repr=False)
class LSTM(AffineCell):
    """The cell that `lstm` makes: to subclass, and to test for by ``isinstance``.

    A subclass may emit other fields of the state than ``h`` (see `AffineCell`), or have gates of its own.

    >>> class Whole(jrnn.LSTM):
    ...     emits = ("h", "c")
    >>> cell = Whole(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 8)
    """

    forget_bias: float = 1.0
    activation: activations.Activation = "tanh"
    gate_activation: activations.Activation = "sigmoid"

    gate_names: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    state_type: ClassVar[Any] = LSTMState
    elementwise: ClassVar[bool | None] = True
    additive = True

    _constructor = "lstm"

    def __post_init__(self) -> None:
        super().__post_init__()
        activations.resolve(self.activation)
        activations.resolve(self.gate_activation, "gate_activation")

    def init_bias(self, key: jax.Array) -> jax.Array:
        forget = [float(self.forget_bias) if name == "f" else 0.0 for name in self.gate_names]
        return super().init_bias(key) + jnp.repeat(jnp.array(forget, jnp.float32), self.hidden)

    @property
    def functions(self) -> tuple[Any, Any]:
        """The functions of the gates (sigma) and of the candidate and the memory (tanh)."""
        return activations.resolve(self.gate_activation), activations.resolve(self.activation)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        c = sigma(f) * state.c + sigma(i) * tanh(g)
        return LSTMState(sigma(o) * tanh(c), c)


def lstm(
    hidden: int,
    *,
    forget_bias: float = 1.0,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> LSTM:
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate by Gers et al. 2000)::

        i, f, o = sigmoid(x W + h U + b)    g = tanh(x W + h U + b)    W, U and b are others for each gate
        c = f * c + i * g                   h = o * tanh(c)

    B batch axes (any number, or none), F input features, H hidden features.

    Args:
      hidden: H, the number of units.
      forget_bias: a number that is added to the forget gate's part of ``b`` at initialisation (Jozefowicz et al. 2015).
        It is not part of the equations.
      activation: the function written tanh above, of the candidate and of the memory: a name of `jrnn.activations` or
        a module-level function.
      gate_activation: the function of the gates, written sigmoid above.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``, drawn gate by gate (see
        `jrnn.initializers`).

    Parameters: ``w_ih (F, 4H)``, ``w_hh (H, 4H)``, ``b (4H,)``, float32, with the gates in the order i, f, g, o. The
    state is `LSTMState` with ``h`` and ``c``, each ``(*B, H)``. The output is ``h``.

    Raises:
      ValueError, TypeError: ``hidden`` is no positive int, or an activation or an initialiser is unknown.

    >>> cell = jrnn.lstm(4)
    >>> (h, c), ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))
    >>> ys.shape, bool((ys[-1] == h).all())
    ((5, 2, 4), True)
    """
    return LSTM(
        hidden,
        forget_bias,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class PeepholeLSTM(LSTM):
    """See `peephole_lstm`."""

    additive = True

    _constructor = "peephole_lstm"

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        return {f"p_{gate}": initializers.normal(0.1)(k, (self.hidden,)) for gate, k in zip("ifo", keys, strict=True)}

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        i = sigma(i + vector(theta["p_i"], i) * state.c)
        f = sigma(f + vector(theta["p_f"], f) * state.c)
        c = f * state.c + i * tanh(g)
        return LSTMState(sigma(o + vector(theta["p_o"], o) * c) * tanh(c), c)


def peephole_lstm(
    hidden: int,
    *,
    forget_bias: float = 1.0,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> PeepholeLSTM:
    """LSTM whose gates also see the memory (Gers and Schmidhuber 2000)::

        i = sigmoid(x W_i + h U_i + p_i * c + b_i)    f = sigmoid(x W_f + h U_f + p_f * c + b_f)
        c' = f * c + i * tanh(x W_g + h U_g + b_g)    o = sigmoid(x W_o + h U_o + p_o * c' + b_o)
        h' = o * tanh(c')

    The arguments are those of `lstm`. The parameters are those of `lstm` and the vectors ``p_i``, ``p_f`` and ``p_o``,
    each ``(H,)``.

    >>> cell = jrnn.peephole_lstm(4)
    >>> cell.init(jax.random.key(0), 3)["p_o"].shape
    (4,)
    """
    return PeepholeLSTM(
        hidden,
        forget_bias,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class CoupledLSTM(LSTM):
    """See `coupled_lstm`."""

    gate_names: ClassVar[tuple[str, ...]] = ("f", "g", "o")

    _constructor = "coupled_lstm"

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        f, g, o = (a + b for a, b in zip(u, v, strict=True))
        f = sigma(f)
        c = f * state.c + (1 - f) * tanh(g)
        return LSTMState(sigma(o) * tanh(c), c)


def coupled_lstm(
    hidden: int,
    *,
    forget_bias: float = 1.0,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> CoupledLSTM:
    """LSTM with coupled input and forget gates, ``i = 1 - f`` (CIFG; Greff et al. 2017)::

        c = f * c + (1 - f) * g    h = o * tanh(c)

    Arguments and parameters are those of `lstm`, with three gates in the order f, g, o.

    >>> cell = jrnn.coupled_lstm(4)
    >>> cell.init(jax.random.key(0), 3)["w_ih"].shape
    (3, 12)
    """
    return CoupledLSTM(
        hidden,
        forget_bias,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class LayerNormLSTM(LSTM):
    """See `layer_norm_lstm`."""

    epsilon: float = field(default=1e-5, kw_only=True)

    elementwise: ClassVar[bool | None] = False
    additive = False

    _constructor = "layer_norm_lstm"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.epsilon(self.epsilon)

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        width, hidden = len(self.gate_names) * self.hidden, self.hidden
        return {
            "scale_ih": jnp.ones(width, jnp.float32),
            "scale_hh": jnp.ones(width, jnp.float32),
            "scale_c": jnp.ones(hidden, jnp.float32),
            "shift_c": jnp.zeros(hidden, jnp.float32),
        }

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        u = layer_norm(product(xs, params["w_ih"]), params["scale_ih"], self.epsilon)
        return self.split(u + vector(params["b"], u))

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        sigma, tanh = self.functions
        v = layer_norm_gates(v, self.split(theta["scale_hh"]), self.epsilon)
        i, f, g, o = (a + b for a, b in zip(u, v, strict=True))
        c = sigma(f) * state.c + sigma(i) * tanh(g)
        normed = layer_norm(c, theta["scale_c"], self.epsilon) + vector(theta["shift_c"], c)
        return LSTMState(sigma(o) * tanh(normed), c)


def layer_norm_lstm(
    hidden: int,
    *,
    forget_bias: float = 1.0,
    epsilon: float = 1e-5,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> LayerNormLSTM:
    """Layer-normalised LSTM (Ba, Kiros and Hinton 2016, equations 20-22)::

        i, f, g, o = LN(x W_ih) * scale_ih + LN(h W_hh) * scale_hh + b      LN over all 4H
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(LN(c) * scale_c + shift_c)                    LN over H

    ``b`` stands for the sum of the paper's three shifts of the gates.

    Args:
      epsilon: added to variances.
      hidden, forget_bias, activation, gate_activation, input_init, recurrent_init, bias_init: as for `lstm`.

    >>> cell = jrnn.layer_norm_lstm(4)
    >>> jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 2, 3)))[1].shape
    (5, 2, 4)
    """
    return LayerNormLSTM(
        hidden,
        forget_bias,
        epsilon=epsilon,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class ProjectionLSTM(WeightedCell):
    """See `projection_lstm`."""

    projection: int
    forget_bias: float = 1.0

    _constructor = "projection_lstm"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int(self.projection, "projection")

    @property
    def _lstm(self) -> LSTM:
        """The LSTM whose gates these are."""
        inits = {name: getattr(self, name) for name in ("input_init", "recurrent_init", "bias_init")}
        return LSTM(self.hidden, self.forget_bias, **inits)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        prng_key(key)
        k_ih, k_hh, k_b, k_hr = jax.random.split(key, 4)
        gates = self._lstm
        return {
            "w_ih": gates._per_gate(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": gates._per_gate(self.recurrent_init, k_hh, (self.projection, self.hidden)),
            "b": gates.init_bias(k_b),
            "w_hr": initializers.resolve(self.input_init)(k_hr, (self.hidden, self.projection), jnp.float32),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> LSTMState:
        batch, dtype = batch_axes(batch_shape), stable(params["w_hh"].dtype)
        return LSTMState(jnp.zeros((*batch, self.projection), dtype), jnp.zeros((*batch, self.hidden), dtype))

    def out_features(self, in_features: Any) -> int:
        return self.projection

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.projection, 4 * self.hidden))
        check_named(self, params, {"w_hr": (self.hidden, self.projection)})
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        return self._lstm.project(params, xs)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        h, c = self._lstm.gates({}, p, self._lstm.recur(params, state.h), state)
        h = product(h, params["w_hr"])
        return LSTMState(h, c), h


def projection_lstm(
    hidden: int,
    projection: int,
    *,
    forget_bias: float = 1.0,
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> ProjectionLSTM:
    """LSTM with a projected output (Sak, Senior and Beaufays 2014): as `lstm`, then ``h = (o * tanh(c)) W_hr``.

    Args:
      hidden: H, units of the memory ``c``.
      projection: P, features of ``h``, which is fed back and put out.
      forget_bias: as for `lstm`.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih`` and ``w_hr``, of ``w_hh``, and of ``b``.

    Parameters: ``w_ih (F, 4H)``, ``w_hh (P, 4H)``, ``b (4H,)``, ``w_hr (H, P)``.

    >>> cell = jrnn.projection_lstm(8, 2)
    >>> (h, c), ys = jrnn.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
    >>> ys.shape, h.shape, c.shape
    ((5, 2), (2,), (8,))
    """
    return ProjectionLSTM(
        hidden,
        projection,
        forget_bias,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
