"""Echo state networks: a reservoir that is drawn and not trained, whose readout is solved for (see `jrnn.ridge`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
from jax import lax

from jrnn import activations, initializers
from jrnn._core.checks import finite
from jrnn.cells.affine import AffineCell
from jrnn.cells.base import HiddenState

__all__ = ["echo_state"]


@dataclass(frozen=True, repr=False)
class EchoState(AffineCell):
    """See `echo_state`."""

    leak: float = 1.0
    activation: activations.Activation = "tanh"
    trainable: bool = False
    input_init: initializers.Initializer = field(default=initializers.uniform(1.0), kw_only=True)
    recurrent_init: initializers.Initializer = field(default=initializers.reservoir(), kw_only=True)

    elementwise: ClassVar[bool | None] = True
    additive = True

    _constructor = "echo_state"

    def _constructor_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (hidden,), options = super()._constructor_arguments()
        inits: dict[str, Any] = {
            name: options.pop(name, None) for name in ("input_init", "recurrent_init", "bias_init")
        }
        if inits["recurrent_init"] is not None:
            options |= {"spectral_radius": inits["recurrent_init"].radius, "density": inits["recurrent_init"].density}
        for name, option in (("input_init", "input_scale"), ("bias_init", "bias_scale")):
            if inits[name] is not None:
                options[option] = inits[name].bound
        return (hidden,), options

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.leak, "leak", above=0.0)
        if self.leak > 1:
            raise ValueError(f"leak: expected a rate in (0, 1], got {self.leak}")
        activations.resolve(self.activation)

    # Unless it is to be trained, the weights of a reservoir are constants to every derivative.

    def input_weights(self, params: Any) -> tuple[jax.Array, jax.Array]:
        weights = super().input_weights(params)
        return weights if self.trainable else lax.stop_gradient(weights)

    def recurrent_weights(self, params: Any) -> jax.Array:
        weights = super().recurrent_weights(params)
        return weights if self.trainable else lax.stop_gradient(weights)

    def gates(self, theta: Any, u: Any, v: Any, state: Any) -> Any:
        new = activations.resolve(self.activation)(u[0] + v[0])
        return HiddenState(new if self.leak == 1 else (1 - self.leak) * state.h + self.leak * new)


def echo_state(
    hidden: int,
    *,
    spectral_radius: float = 0.9,
    leak: float = 1.0,
    density: float = 0.1,
    input_scale: float = 1.0,
    bias_scale: float = 0.0,
    activation: activations.Activation = "tanh",
    trainable: bool = False,
) -> EchoState:
    """Echo state network with leaky units (Jaeger 2001; Jaeger et al. 2007)::

        h = (1 - leak) h + leak tanh(x W_ih + h W_hh + b)

    The reservoir is drawn and not trained: gradients with respect to its parameters are zero, and those with respect to
    inputs and states are not. (Weight decay would still change its parameters. Exclude them from such an optimiser.)
    The readout is linear and is solved for in closed form: `jrnn.ridge` gives the parameters of the `jrnn.dense` layer
    on top.

    Args:
      hidden: H, the number of units of the reservoir.
      spectral_radius: the largest absolute eigenvalue of ``w_hh``, positive.
      leak: in (0, 1]; 1 for units that do not leak.
      density: the share of ``w_hh`` that is not zero, in (0, 1].
      input_scale, bias_scale: ``w_ih`` and ``b`` are drawn uniformly between minus and plus this number.
      activation: the function written tanh above.
      trainable: whether the parameters of the reservoir get gradients.

    Parameters: ``w_ih (F, H)``, ``w_hh (H, H)``, ``b (H,)``.

    Raises:
      ValueError: if ``spectral_radius``, ``leak``, ``density`` or a scale is out of range.

    >>> cell = jrnn.echo_state(50, spectral_radius=1.1, leak=0.5)
    >>> params, xs = cell.init(jax.random.key(0), 1), jnp.sin(jnp.arange(300) / 5)[:, None]
    >>> _, states = jrnn.unroll(cell, params, xs[:-1])
    >>> readout = jrnn.ridge(states, xs[1:], alpha=1e-6, washout=50)
    >>> predicted = jrnn.unroll(jrnn.dense(1), readout, states)[1]
    >>> bool(jnp.abs(predicted - xs[1:])[50:].max() < 0.01)
    True
    """
    finite(input_scale, "input_scale", least=0.0)
    finite(bias_scale, "bias_scale", least=0.0)
    return EchoState(
        hidden,
        leak,
        activation,
        trainable,
        input_init=initializers.uniform(float(input_scale)),
        recurrent_init=initializers.reservoir(spectral_radius, density),
        bias_init=initializers.uniform(float(bias_scale)) if bias_scale else "zeros",
    )
