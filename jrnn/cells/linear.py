"""Cells whose step is linear in their state: ``h = a * h + b``, with ``a`` and ``b`` functions of the input alone.

All steps of such a cell can be run in parallel over time, or at the speed of memory (`jrnn.linear_scan`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jrnn import initializers
from jrnn._core.checks import batch_axes, finite, non_negative_int, positive_int
from jrnn.cells.base import (
    Cell,
    HiddenState,
    check_features,
    check_named,
    check_state,
    compute_params,
    emitted,
    product,
    stable,
    vector,
)
from jrnn.cells.form import LinearForm

__all__ = ["ForgetGateCell", "GatedLinearCell", "LinearCell"]


class LinearCell(Cell):
    """A cell whose step is ``h = a * h + b``, elementwise, with coefficients that do not depend on the state.

    T time, B batch axes (any number, or none), F input features, H hidden features.

    A subclass is a frozen dataclass with ``init`` and

    - ``coefficients(params, xs) -> (a, b)``, for one step, ``xs (*B, F)``, or for all T in one call, ``(T, *B, F)``.
      ``b`` has the axes of ``xs`` before its features and then those of ``h``; ``a`` broadcasts against it. Both have
      the dtype of the state: real or complex.
    - ``readout(params, h, xs) -> y``, likewise for one step or for all T; by default ``y`` is ``h``.
    - ``state_form(params)``, the shapes and dtypes of the state of one sequence; by default ``HiddenState(h)`` with
      ``h (H,)``, H being the field ``hidden``. The state starts as zeros, and ``h`` is its first field.

    Where ``window`` is more than 1, ``xs`` are the inputs of the last so many steps side by side, the oldest first,
    ``(*B, window * F)``. The state then has a second field, which holds the inputs before this one, ``(*B, window - 1,
    F)``; steps before the first and before a reset count as zeros.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Average(jrnn.LinearCell):
    ...     hidden: int
    ...     def init(self, key, in_features):
    ...         return {"w": jax.random.normal(key, (in_features, self.hidden))}
    ...     def coefficients(self, params, xs):
    ...         return 0.9, 0.1 * jrnn.product(xs, params["w"])
    >>> cell = Average(4)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> state, ys = jrnn.unroll(cell, params, jnp.ones((5, 2, 3)), backend="associative")
    >>> bool(jnp.allclose(ys, jrnn.unroll(cell, params, jnp.ones((5, 2, 3)), backend="reference")[1], atol=1e-5))
    True
    """

    window: Any = 1
    uses_key = False

    # What a subclass gives.

    def coefficients(self, params: Any, xs: jax.Array) -> tuple[Any, jax.Array]:
        """``(a, b)`` of one step, or of all T."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients(params, xs) -> (a, b)")

    def readout(self, params: Any, h: jax.Array, xs: jax.Array) -> jax.Array:
        """``y`` of one step, or of all T; by default ``h``."""
        return h

    def state_form(self, params: Any) -> Any:
        """The state of one sequence, as `jax.ShapeDtypeStruct`; by default ``HiddenState(h)`` with ``h (H,)``."""
        return HiddenState(form((self.hidden,), parameter_dtype(params)))  # type: ignore[attr-defined]

    # What follows from it.

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        """Zeros."""
        batch = batch_axes(batch_shape)
        return jax.tree.map(lambda leaf: jnp.zeros((*batch, *leaf.shape), leaf.dtype), self.state_form(params))

    def form(self, params: Any) -> LinearForm | None:
        """The linear form; None where the step is overridden, and so may not be that of the coefficients."""
        own = type(self)
        declared = (own.step, own.update, own.project) == (LinearCell.step, LinearCell.update, LinearCell.project)
        return LinearForm(self, params) if declared else None

    @property
    def hoistable(self) -> bool:
        return self.window == 1 and type(self).step is LinearCell.step

    def coefficients_of(self, params: Any, xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The coefficients as arrays of one dtype and with as many axes each."""
        a, b = self.coefficients(params, xs)
        return lax.broadcast_to_rank(jnp.asarray(a, b.dtype), b.ndim), b

    def project(self, params: Any, xs: jax.Array) -> Any:
        a, b = self.coefficients_of(params, xs)
        return jnp.broadcast_to(a, b.shape), b, xs

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        a, b, x = p
        h = a * state[0] + b
        return state._replace(**{state._fields[0]: h}), self.readout(params, h, x)

    def step(self, params: Any, state: Any, x: jax.Array, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.asarray(x)
        self.check(params, x)
        check_state(self, params, state, x)
        params, inputs, rest = compute_params(params, x.dtype), x, state[1:]
        if self.window > 1:
            taps = jnp.concatenate([state[1], x[..., None, :].astype(state[1].dtype)], -2)
            inputs, rest = taps.reshape(*x.shape[:-1], self.window * x.shape[-1]).astype(x.dtype), (taps[..., 1:, :],)
        a, b = self.coefficients_of(params, inputs)
        h = a * state[0] + b
        return type(state)(h, *rest), emitted(self.readout(params, h, inputs), x)


def form(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def parameter_dtype(params: Any) -> Any:
    """The dtype in which the state is kept: that of the parameters, but at least float32."""
    return stable(jax.tree.leaves(params)[0].dtype)


def check_windows(x: Any, w: Any, cell: Any) -> None:
    """Raises if inputs do not fit a weight that takes those of a whole window side by side."""
    check_features(x, form((w.shape[0] // cell.window, *w.shape[1:]), w.dtype), "xs", cell)


@dataclass(frozen=True, repr=False)
class GatedLinearCell(LinearCell):
    """A linear cell whose coefficients are made of gates, ``x W_ih + b``; a subclass names these in ``gate_names``.

    Args:
      hidden: H, the number of units.
      input_init, bias_init: initialisers of ``w_ih (F, G*H)`` and ``b (G*H,)``, drawn gate by gate.
    """

    hidden: int
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    gate_names: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        for name in ("input_init", "bias_init"):
            initializers.resolve(getattr(self, name), name)

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        non_negative_int(in_features, "in_features")
        k_ih, k_b = jax.random.split(key)
        return {
            "w_ih": self.per_gate(self.input_init, k_ih, (self.window * in_features, self.hidden)),
            "b": self.per_gate(self.bias_init, k_b, (self.hidden,)),
        }

    def per_gate(self, init: initializers.Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        keys = jax.random.split(key, len(self.gate_names))
        return jnp.concatenate([initializers.draw(init, k, shape) for k in keys], -1)

    def check(self, params: Any, x: Any) -> None:
        width = len(self.gate_names) * self.hidden
        inputs = jnp.shape(params["w_ih"])[:1] if isinstance(params, Mapping) and "w_ih" in params else (x.shape[-1],)
        check_named(self, params, {"w_ih": (*inputs, width), "b": (width,)})
        check_windows(x, params["w_ih"], self)

    def gate_inputs(self, params: Any, xs: jax.Array, *names: str) -> tuple[jax.Array, ...]:
        """``x W_ih + b`` of gates that follow each other, by default of all: one array a gate."""
        first = self.gate_names.index(names[0]) if names else 0
        count = len(names) if names else len(self.gate_names)
        columns = slice(first * self.hidden, (first + count) * self.hidden)
        u = product(xs, params["w_ih"][:, columns])
        return tuple(jnp.split(u + vector(params["b"][columns], u), count, -1))


@dataclass(frozen=True, repr=False)
class ForgetGateCell(GatedLinearCell):
    """A gated linear cell that multiplies its state by ``σ(forget_bias)`` at a step whose input is zero.

    Args:
      forget_bias: a number, or an initialiser of one for each unit. It is added to the biases of the gates in
        ``forget_signs`` at initialisation, or subtracted where the sign is -1.
    """

    forget_bias: float | initializers.Initializer = field(default=0.0, kw_only=True)

    # Of each gate whose bias says how long the state is kept.
    forget_signs: ClassVar[Mapping[str, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.forget_bias, str) or callable(self.forget_bias):
            initializers.resolve(self.forget_bias, "forget_bias")
        else:
            finite(self.forget_bias, "forget_bias")

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        params = super().init(key, in_features)
        kept: Any = self.forget_bias
        if isinstance(kept, str) or callable(kept):
            kept = initializers.draw(kept, jax.random.fold_in(key, 1), (self.hidden,))
        kept = jnp.broadcast_to(jnp.asarray(kept, jnp.float32), (self.hidden,))
        params["b"] += jnp.concatenate([self.forget_signs.get(name, 0) * kept for name in self.gate_names])
        return params
