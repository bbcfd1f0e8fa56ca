"""The time-delay network that recurrent networks replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import activations, initializers
from jrnn._core.checks import batch_axes, positive_int, prng_key
from jrnn.cells.base import Cell, check_features, check_named, exported, product, stable, vector

__all__ = ["TDNNState", "tdnn"]


@exported
class TDNNState(NamedTuple):
    """``pending (*B, (window - 1) * dilation, H)``: the sums of past inputs' contributions to the next outputs.

    >>> jrnn.tdnn(4, window=3).initial_state(jrnn.tdnn(4, window=3).init(jax.random.key(0), 2), ()).pending.shape
    (2, 4)
    """

    pending: jax.Array


@dataclass(frozen=True, repr=False)
class TDNN(Cell):
    """See `tdnn`."""

    features: int
    window: int
    dilation: int = 1
    activation: activations.Activation = "tanh"
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    uses_key = False

    _constructor = "tdnn"

    def __post_init__(self) -> None:
        for name in ("features", "window", "dilation"):
            positive_int(getattr(self, name), name)
        activations.resolve(self.activation)
        initializers.resolve(self.input_init, "input_init")
        initializers.resolve(self.bias_init, "bias_init")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        positive_int(in_features, "in_features")
        prng_key(key)
        k_w, k_b = jax.random.split(key)
        # Fans are those of the whole window, since an output sums over it.
        w = initializers.resolve(self.input_init)(k_w, (self.window * in_features, self.features), jnp.float32)
        return {
            "w": w.reshape(self.window, in_features, self.features),
            "b": initializers.resolve(self.bias_init)(k_b, (self.features,), jnp.float32),
        }

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> TDNNState:
        shape = (*batch_axes(batch_shape), (self.window - 1) * self.dilation, self.features)
        return TDNNState(jnp.zeros(shape, stable(params["w"].dtype)))

    def out_features(self, in_features: Any) -> int:
        return self.features

    def check(self, params: Any, x: Any) -> None:
        taps = jnp.shape(params["w"])[1:2] if isinstance(params, Mapping) and "w" in params else (x.shape[-1],)
        check_named(self, params, {"w": (self.window, *taps, self.features), "b": (self.features,)})
        check_features(x, params["w"], "xs", self, axis=1)

    def project(self, params: Any, xs: jax.Array) -> jax.Array:
        # Every tap of every step in one product; the loop over time is left with additions.
        taps, inputs, features = params["w"].shape
        w = params["w"].transpose(1, 0, 2).reshape(inputs, taps * features)
        return product(xs, w).reshape(*xs.shape[:-1], taps, features)

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        delays = (self.window - 1) * self.dilation
        padding = [(0, 0)] * (p.ndim - 2)
        later = p[..., 1:, :]
        if delays and self.dilation > 1:  # tap k belongs k * dilation steps on: zeros before and between the taps
            zeros = self.dilation - 1
            config = [*((0, 0, 0) for _ in padding), (zeros, 0, zeros), (0, 0, 0)]
            later = lax.pad(later, jnp.zeros((), p.dtype), config)
        queue = jnp.pad(state.pending, [*padding, (0, 1), (0, 0)])
        y = queue[..., 0, :] + p[..., 0, :]
        y = activations.resolve(self.activation)(y + vector(params["b"], y))
        return TDNNState(queue[..., 1:, :] + later), y


def tdnn(
    features: int,
    window: int,
    *,
    dilation: int = 1,
    activation: activations.Activation = "tanh",
    input_init: initializers.Initializer = "glorot_uniform",
    bias_init: initializers.Initializer = "zeros",
) -> TDNN:
    """Time-delay network (Waibel et al. 1989): a layer over a window of the last steps.

    ``y[t] = f(b + sum_k x[t - k * dilation] w[k])`` for k = 0 … window - 1; steps before the first count as zero.
    It is causal, and its window moves over the valid steps only.

    Args:
      features: H, features of the output.
      window: the number of steps that an output depends on, its own included.
      dilation: the number of steps from one of these steps to the next.
      activation: f.
      input_init, bias_init: initialisers of ``w``, taken as one matrix ``(window * F, H)``, and of ``b``.

    Parameters: ``w (window, F, H)``, ``b (H,)``.

    >>> layer = jrnn.tdnn(4, window=3)
    >>> jrnn.unroll(layer, layer.init(jax.random.key(0), 2), jnp.ones((5, 2)))[1].shape
    (5, 4)
    """
    return TDNN(features, window, dilation, activation, input_init=input_init, bias_init=bias_init)
