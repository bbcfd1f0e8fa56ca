"""The convolutional LSTM and GRU: maps of features over one, two or three axes of space, instead of vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import activations, initializers
from jrnn._core.checks import batch_axes, positive_int
from jrnn._core.devices import is_placed
from jrnn.cells.base import Cell, HiddenState, check_features, check_named, is_low, stable, vector
from jrnn.cells.lstm import LSTMState

__all__ = ["conv_gru", "conv_lstm"]


_LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of ``x (..., *space, C)`` with ``w (*kernel, C, F)``, as large as ``x``; zeros lie around it.

    Any number of axes may come first. Operands are rounded to the narrower of their dtypes; sums are taken in at least
    float32.
    """
    ndim = w.ndim - 2
    if is_low(x.dtype) or is_low(w.dtype):
        # Rounded, then multiplied in float32: JAX cannot transpose a convolution whose result is wider than its inputs.
        narrow = x.dtype if is_low(x.dtype) else w.dtype
        x, w = (a.astype(narrow).astype(jnp.float32) for a in (x, w))
    lead = x.shape[: x.ndim - ndim - 1]
    spec = tuple(jax.typeof(x).sharding.spec)[: len(lead)] if is_placed(x) else ()
    # Only the first of the axes that are joined may lie over a mesh.
    axis = next((i for i, over in enumerate(spec) if over is not None), 0)
    moved = jnp.moveaxis(x, axis, 0) if axis else x
    flat = moved.reshape(math.prod(lead), *x.shape[len(lead) :])
    y = lax.conv_general_dilated(flat, w, (1,) * ndim, "SAME", dimension_numbers=_LAYOUTS[ndim])
    y = y.reshape(*moved.shape[: len(lead)], *y.shape[1:])
    return jnp.moveaxis(y, 0, axis) if axis else y


@dataclass(frozen=True, repr=False)
class ConvCell(Cell):
    """What the convolutional cells share: their weights, and the convolution of the inputs of all T at once."""

    features: int
    kernel: int | tuple[int, ...]
    activation: activations.Activation = field(default="tanh", kw_only=True)
    gate_activation: activations.Activation = field(default="sigmoid", kw_only=True)
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    recurrent_init: initializers.Initializer = field(default="orthogonal", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    gate_names: ClassVar[tuple[str, ...]] = ()
    emits = "h"
    uses_key = False

    def __post_init__(self) -> None:
        positive_int(self.features, "features")
        if not isinstance(self.kernel, int | tuple) or isinstance(self.kernel, bool):
            raise TypeError(
                f"kernel: expected a positive int for a square kernel, or a tuple with a size for each of 1, 2 or 3 "
                f"axes of space, got {self.kernel!r}"
            )
        if len(self.sizes) not in _LAYOUTS:
            raise ValueError(f"kernel: expected a size for each of 1, 2 or 3 axes of space, got {self.kernel!r}")
        for size in self.sizes:
            positive_int(size, "kernel")
        activations.resolve(self.activation)
        activations.resolve(self.gate_activation, "gate_activation")
        for name in ("input_init", "recurrent_init", "bias_init"):
            initializers.resolve(getattr(self, name), name)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of the kernel along each axis of space."""
        return (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel

    @property
    def event_ndim(self) -> int:
        return len(self.sizes) + 1

    @property
    def functions(self) -> tuple[Any, Any]:
        """The functions of the gates (sigma) and of the candidate and the memory (tanh)."""
        return activations.resolve(self.gate_activation), activations.resolve(self.activation)

    def init(self, key: jax.Array, in_features: Any) -> dict[str, jax.Array]:
        *space, channels = self._event(in_features)
        k_ih, k_hh, k_b = jax.random.split(key, 3)
        return {
            "w_ih": self._per_gate(self.input_init, k_ih, (*self.sizes, channels, self.features)),
            "w_hh": self._per_gate(self.recurrent_init, k_hh, (*self.sizes, self.features, self.features)),
            "b": self._per_gate(self.bias_init, k_b, (self.features,)),
            "space": jnp.zeros(space, jnp.float32),
        }

    def _event(self, in_features: Any) -> tuple[int, ...]:
        names = ", ".join(("D", "H", "W")[3 - len(self.sizes) :] if len(self.sizes) > 1 else ("W",))
        if not isinstance(in_features, tuple | list) or len(in_features) != self.event_ndim:
            raise ValueError(
                f"in_features: expected a tuple ({names}, C), the {len(self.sizes)} axes of space and the features, "
                f"for {self!r}, got {in_features!r}"
            )
        for size in in_features:
            positive_int(size, "in_features")
        return tuple(in_features)

    def _per_gate(self, init: initializers.Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        keys = jax.random.split(key, len(self.gate_names))
        return jnp.concatenate([initializers.draw(init, k, shape) for k in keys], axis=-1)

    def _zeros(self, params: Any, batch_shape: tuple[int, ...]) -> jax.Array:
        shape = (*batch_axes(batch_shape), *jnp.shape(params["space"]), self.features)
        return jnp.zeros(shape, stable(params["w_hh"].dtype))

    def out_features(self, in_features: Any) -> tuple[int, ...]:
        return (*self._event(in_features)[:-1], self.features)

    def check(self, params: Any, x: Any) -> None:
        width = len(self.gate_names) * self.features
        check_named(self, params, {"w_hh": (*self.sizes, self.features, width), "b": (width,)})
        w_ih, space = jnp.shape(params.get("w_ih")), jnp.shape(params.get("space"))
        if (*w_ih[:-2], *w_ih[-1:]) != (*self.sizes, width) or len(space) != len(self.sizes):
            raise ValueError(
                f"params: expected w_ih {(*self.sizes, 'C', width)} and space with {len(self.sizes)} axes for "
                f"{self!r}, got {w_ih} and {space}; make them with {self!r}.init(key, in_features)"
            )
        check_features(x, params["w_ih"], "xs", self, axis=-2)
        if x.shape[-self.event_ndim : -1] != space:
            raise ValueError(
                f"xs: expected {space} places, as in_features gave the parameters of {self!r}, got shape {x.shape}; "
                "for maps of another size, put jnp.zeros of that size for the parameter space"
            )

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        u = convolve(xs, params["w_ih"])
        return self._split(u + vector(params["b"], u))

    def _split(self, z: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(z, z.shape[-1] // self.features, axis=-1))


@dataclass(frozen=True, repr=False)
class ConvLSTM(ConvCell):
    """See `conv_lstm`."""

    forget_bias: float = 1.0

    gate_names: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")

    _constructor = "conv_lstm"

    def init(self, key: jax.Array, in_features: Any) -> dict[str, jax.Array]:
        params = super().init(key, in_features)
        forget = [float(self.forget_bias) if name == "f" else 0.0 for name in self.gate_names]
        return {**params, "b": params["b"] + jnp.repeat(jnp.array(forget, jnp.float32), self.features)}

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> LSTMState:
        return LSTMState(self._zeros(params, batch_shape), self._zeros(params, batch_shape))

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        sigma, tanh = self.functions
        v = self._split(convolve(state.h, params["w_hh"]))
        i, f, g, o = (a + b for a, b in zip(p, v, strict=True))
        c = sigma(f) * state.c + sigma(i) * tanh(g)
        h = sigma(o) * tanh(c)
        return LSTMState(h, c), h


def conv_lstm(
    features: int,
    kernel: int | tuple[int, ...],
    *,
    forget_bias: float = 1.0,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> ConvLSTM:
    """Convolutional LSTM (Shi et al. 2015), without peepholes, as Keras has it::

        i, f, o = sigmoid(x * W + h * U + b)    g = tanh(x * W + h * U + b)     * is a convolution
        c = f c + i g                           h = o tanh(c)                   elementwise, at every place

    Inputs are ``xs (T, *B, H, W, C)``, or with one or three axes of space in the place of ``H, W``. Convolutions have
    stride 1 and zeros around the edge, so that every map has the size of the input. The inputs of all T are convolved
    at once, before the loop.

    Args:
      features: features of ``h`` and ``c``.
      kernel: the size of the kernel along each axis of space, a tuple of 1, 2 or 3 numbers; an int k means ``(k, k)``.
      forget_bias: added to the forget gate's part of ``b`` at initialisation.
      activation, gate_activation: the functions written tanh and sigmoid above.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih``, ``w_hh`` and ``b``, drawn gate by gate.

    ``init`` takes ``in_features = (H, W, C)``. Parameters: ``w_ih (*kernel, C, 4 features)``, ``w_hh (*kernel,
    features, 4 features)``, ``b (4 features,)``, gates in the order i, f, g, o; and ``space (H, W)``, zeros whose shape
    is the size of a state. The weights do not depend on this size: replace ``space`` by zeros of another shape to run
    them on maps of that size.

    Raises:
      ValueError: if ``kernel`` and ``in_features`` differ in the number of axes of space.

    >>> cell = jrnn.conv_lstm(4, (3, 3))
    >>> params = cell.init(jax.random.key(0), (6, 5, 2))
    >>> state, ys = jrnn.unroll(cell, params, jnp.ones((7, 2, 6, 5, 2)))
    >>> ys.shape, state.c.shape
    ((7, 2, 6, 5, 4), (2, 6, 5, 4))
    """
    return ConvLSTM(
        features,
        kernel,
        forget_bias,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )


@dataclass(frozen=True, repr=False)
class ConvGRU(ConvCell):
    """See `conv_gru`."""

    reset: str = "after"

    gate_names: ClassVar[tuple[str, ...]] = ("r", "z", "n")

    _constructor = "conv_gru"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset not in ("after", "before"):
            raise ValueError(f'reset: expected "after" or "before", got {self.reset!r}')

    def init(self, key: jax.Array, in_features: Any) -> dict[str, jax.Array]:
        params = super().init(key, in_features)
        if self.reset == "after":
            k_n = jax.random.fold_in(key, 1)
            params["b_hn"] = initializers.draw(self.bias_init, k_n, (self.features,))
        return params

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> HiddenState:
        return HiddenState(self._zeros(params, batch_shape))

    def check(self, params: Any, x: Any) -> None:
        super().check(params, x)
        if self.reset == "after":
            check_named(self, params, {"b_hn": (self.features,)})

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        sigma, tanh = self.functions
        h, w_hh = state.h, params["w_hh"]
        if self.reset == "after":
            v = self._split(convolve(h, w_hh))
            r, z = sigma(p[0] + v[0]), sigma(p[1] + v[1])
            n = tanh(p[2] + r * (v[2] + vector(params["b_hn"], r)))
        else:
            v = self._split(convolve(h, w_hh[..., : 2 * self.features]))
            r, z = sigma(p[0] + v[0]), sigma(p[1] + v[1])
            n = tanh(p[2] + convolve(r * h, w_hh[..., 2 * self.features :]))
        h = (1 - z) * n + z * h
        return HiddenState(h), h


def conv_gru(
    features: int,
    kernel: int | tuple[int, ...],
    reset: str = "after",
    *,
    activation: activations.Activation = "tanh",
    gate_activation: activations.Activation = "sigmoid",
    input_init: initializers.Initializer = "glorot_uniform",
    recurrent_init: initializers.Initializer = "orthogonal",
    bias_init: initializers.Initializer = "zeros",
) -> ConvGRU:
    """Convolutional GRU (Ballas et al. 2016)::

        r, z = sigmoid(x * W + h * U + b)                   * is a convolution
        n = tanh(x * W_n + b_n + r (h * U_n + b_hn))        reset="after" (one convolution a step)
        n = tanh(x * W_n + b_n + (r h) * U_n)               reset="before", as in the paper (two)
        h = (1 - z) n + z h                                 elementwise, at every place

    Args:
      features: features of ``h``.
      kernel: as for `conv_lstm`.
      reset: "after" or "before": whether the reset gate multiplies the result of the convolution or its input ``h``.
      activation, gate_activation: the functions written tanh and sigmoid above.
      input_init, recurrent_init, bias_init: as for `conv_lstm`.

    ``init`` takes ``in_features = (H, W, C)``. Parameters: as for `conv_lstm`, with three gates in the order r, z, n,
    and after also ``b_hn (features,)``.

    >>> cell = jrnn.conv_gru(4, (3,))
    >>> params = cell.init(jax.random.key(0), (6, 2))
    >>> jrnn.unroll(cell, params, jnp.ones((5, 2, 6, 2)))[1].shape
    (5, 2, 6, 4)
    """
    return ConvGRU(
        features,
        kernel,
        reset,
        activation=activation,
        gate_activation=gate_activation,
        input_init=input_init,
        recurrent_init=recurrent_init,
        bias_init=bias_init,
    )
