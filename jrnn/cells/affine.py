"""Cells whose step is two matrix products and a function of gates: the library owns the products."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn import initializers
from jrnn._core.checks import batch_axes, describe, non_negative_int, positive_int, prng_key
from jrnn.cells.base import (
    Cell,
    HiddenState,
    Layer,
    check_emits,
    check_features,
    check_named,
    emitted_fields,
    output,
    product,
    stable,
    vector,
)
from jrnn.cells.form import AffineForm, Gates, gate_tuple

__all__ = ["AffineCell", "WeightedCell", "check_affine", "theta_shapes"]


@dataclass(frozen=True, repr=False)
class WeightedCell(Cell):
    """What cells share that have ``w_ih``, ``w_hh`` and ``b``: initialisers of these, and the input projection."""

    hidden: int
    input_init: initializers.Initializer = field(default="glorot_uniform", kw_only=True)
    recurrent_init: initializers.Initializer = field(default="orthogonal", kw_only=True)
    bias_init: initializers.Initializer = field(default="zeros", kw_only=True)

    state_type: ClassVar[Any] = HiddenState
    emits = "h"
    uses_key = False

    def __post_init__(self) -> None:
        positive_int(self.hidden, "hidden")
        for name in ("input_init", "recurrent_init", "bias_init"):
            initializers.resolve(getattr(self, name), name)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        """Zeros, ``(*B, H)`` for each field of the state, in the parameters' dtype but at least float32."""
        shape, dtype = (*batch_axes(batch_shape), self.hidden), stable(params["w_hh"].dtype)
        # Arrays of their own: a state may be donated, and a buffer only once.
        return self.state_type(*(jnp.zeros(shape, dtype) for _ in self.state_type._fields))

    def out_features(self, in_features: Any) -> int:
        return self.hidden

    def project(self, params: Any, xs: jax.Array) -> Any:
        """``u = x W_ih + b``, for one step or for all T in one product."""
        w, b = self.input_weights(params)
        u = product(xs, w)
        return u + vector(b, u)

    def input_weights(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """``W_ih (F, G*H)`` and ``b (G*H,)``, a function of the parameters that is evaluated once per sequence."""
        return params["w_ih"], params["b"]

    def recurrent_weights(self, params: Any) -> jax.Array:
        """``W_hh (H, G*H)``, a function of the parameters that is evaluated once per sequence."""
        return params["w_hh"]


@dataclass(frozen=True, repr=False)
class AffineCell(WeightedCell):
    """A cell whose step is two matrix products and a function of gates. The library computes the products.

    A subclass names its gates in ``gate_names`` and defines ``gates(theta, u, v, state) -> state``. The library calls
    it at each step with the gate inputs ``u`` and ``v``, named tuples with one ``(*B, H)`` array for each gate, such as
    ``u.z``, in the order of the names::

        u = x W_ih + b    for all T steps in one product        v = h W_hh    in one product at each step

    The output ``y`` is the new ``h``. With the class attribute ``emits`` it is another field of the new state, or
    several side by side: for example ``emits = "c"`` or ``emits = ("h", "c")`` in a subclass of an LSTM.

    ``theta`` holds the other parameters, which are vectors and which ``init_theta`` makes. The class attribute
    ``state_type`` is the type of the state, by default ``HiddenState(h)``. All its fields are ``(*B, H)``, and are zero
    before the first step.

    A subclass may promise more, by class attributes that are None where nothing is promised. If ``elementwise`` is
    True, unit j of each new field depends only on unit j of u, v and the state, whatever the shapes of these are. If
    ``additive`` is True, ``gates`` uses u and v only in the sum ``u + v``; a tuple of names promises so of these gates.
    Without these promises, the library finds out by tracing ``gates``.

    Args:
      hidden: H, the number of units.
      input_init, recurrent_init, bias_init: initialisers of ``w_ih (F, G*H)``, ``w_hh (H, G*H)`` and ``b (G*H,)``,
        drawn gate by gate (see `jrnn.initializers`).

    >>> class Leaky(jrnn.AffineCell):
    ...     gate_names = ("z", "n")
    ...     def gates(self, theta, u, v, state):
    ...         z, n = jax.nn.sigmoid(u.z + v.z), jnp.tanh(u.n + v.n)
    ...         return state._replace(h=z * state.h + (1 - z) * n)
    >>> cell = Leaky(8)
    >>> params = cell.init(jax.random.key(0), 3)
    >>> state, ys = jrnn.unroll(cell, params, jnp.ones((5, 2, 3)))
    >>> ys.shape, jrnn.choose_backend(cell, params, jnp.ones((5, 2, 3)))[0]
    ((5, 2, 8), 'hoisted')
    """

    gate_names: ClassVar[tuple[str, ...]] = ("h",)
    elementwise: ClassVar[bool | None] = None
    additive: ClassVar[bool | tuple[str, ...] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        gate_tuple(tuple(self.gate_names))
        if self.is_affine:
            check_emits(self, self.state_type._fields)

    # What a subclass gives.

    def gates(self, theta: dict[str, jax.Array], u: Any, v: Any, state: Any) -> Any:
        """The new state from the gates' input parts ``u``, recurrent parts ``v`` and the old state."""
        raise NotImplementedError(f"{type(self).__name__} must define gates(theta, u, v, state) -> state")

    def init_theta(self, key: jax.Array) -> dict[str, jax.Array]:
        """Parameters besides ``w_ih``, ``w_hh`` and ``b``; none by default."""
        return {}

    def init_bias(self, key: jax.Array) -> jax.Array:
        """``b (G*H,)``, drawn gate by gate."""
        return self._per_gate(self.bias_init, key, (self.hidden,))

    # What follows from it.

    def init(self, key: jax.Array, in_features: int) -> dict[str, jax.Array]:
        """``{"w_ih": (F, G*H), "w_hh": (H, G*H), "b": (G*H,), **theta}`` in float32.

        Without input features (F = 0) the network is autonomous: its inputs, ``(T, *B, 0)``, say how many steps to run.
        """
        prng_key(key)
        non_negative_int(in_features, "in_features")
        k_ih, k_hh, k_b, k_theta = jax.random.split(key, 4)
        return {
            "w_ih": self._per_gate(self.input_init, k_ih, (in_features, self.hidden)),
            "w_hh": self._per_gate(self.recurrent_init, k_hh, (self.hidden, self.hidden)),
            "b": self.init_bias(k_b),
            **self.init_theta(k_theta),
        }

    def out_features(self, in_features: Any) -> int:
        return self.hidden * len(emitted_fields(self)) if self.is_affine else Layer.out_features(self, in_features)

    def check(self, params: Any, x: Any) -> None:
        check_affine(self, params, (self.hidden, len(self.gate_names) * self.hidden))
        check_named(self, params, theta_shapes(self))
        check_features(x, params["w_ih"], "xs", self)

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        """``u = x W_ih + b``, one array a gate, for one step or for all T in one product."""
        return self.split(super().project(params, xs))

    def recur(self, params: Any, h: jax.Array) -> tuple[jax.Array, ...]:
        """``v = h W_hh``, one array a gate."""
        return self.split(product(h, self.recurrent_weights(params)))

    def update(self, params: Any, state: Any, p: Any, key: jax.Array | None = None) -> tuple[Any, jax.Array]:
        state = self.combine(_theta(params), p, self.recur(params, state.h), state, key)
        return state, output(self, state)

    def combine(self, theta: Any, u: Any, v: Any, state: Any, key: Any) -> Any:
        """The gates, as a form has them: see `jrnn.cells.form.Gates`."""
        named = gate_tuple(tuple(self.gate_names))
        return self.gates(theta, named(*u), named(*v), state)

    def form(self, params: Any) -> AffineForm | None:
        """The form of the step; None where a subclass overrides more of the step than ``project`` and ``gates``."""
        if not self.is_affine:
            return None
        named = self.additive if isinstance(self.additive, tuple) else self.gate_names if self.additive else ()
        sums = tuple(None if self.additive is None else name in named for name in self.gate_names)
        projects = type(self).project is not AffineCell.project
        return AffineForm(
            Gates(_Method(self, "combine"), sums, self.elementwise),
            emitted_fields(self),
            params if projects else self.input_weights(params),
            self.recurrent_weights(params),
            _theta(params),
            projection=_Method(self, "project") if projects else None,
        )

    @property
    def is_affine(self) -> bool:
        """Whether the step is the library's: its projection and its gates are what a subclass may override."""
        own = type(self)
        return (own.step, own.update, own.recur) == (Cell.step, AffineCell.update, AffineCell.recur)

    def split(self, z: jax.Array) -> tuple[jax.Array, ...]:
        """``(..., G*H)`` as a named tuple of one ``(..., H)`` array per gate."""
        return gate_tuple(tuple(self.gate_names))(*jnp.split(z, len(self.gate_names), axis=-1))

    def _per_gate(self, init: initializers.Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        keys = jax.random.split(key, len(self.gate_names))
        return jnp.concatenate([initializers.draw(init, k, shape) for k in keys], axis=-1)


@dataclass(frozen=True)
class _Method:
    """A method of a cell, equal to that of an equal cell, as bound methods are not."""

    cell: AffineCell
    name: str

    def __call__(self, *args: Any) -> Any:
        return getattr(self.cell, self.name)(*args)


def _theta(params: Any) -> dict[str, jax.Array]:
    """The parameters that are not those of the two products."""
    return {name: value for name, value in params.items() if name not in ("w_ih", "w_hh", "b")}


@functools.lru_cache(maxsize=256)
def theta_shapes(cell: Any) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in jax.eval_shape(cell.init_theta, jax.random.key(0)).items()}


def check_affine(cell: Any, params: Any, recurrent_shape: tuple[int, ...]) -> None:
    """Raises if parameters are not those of a cell with ``w_ih``, ``w_hh`` of the given shape, and ``b``."""
    remedy = f"make them with {cell!r}.init(key, in_features)"
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected a dict with w_ih, w_hh and b, got {describe(params)}; {remedy}")
    missing = {"w_ih", "w_hh", "b"} - set(params)
    if missing:
        raise ValueError(f"params: expected a dict with w_ih, w_hh and b, got one without {sorted(missing)}; {remedy}")
    shapes = {name: jnp.shape(params[name]) for name in ("w_ih", "w_hh", "b")}
    width = recurrent_shape[-1]
    if (
        shapes["w_hh"] != recurrent_shape
        or len(shapes["w_ih"]) != 2
        or shapes["w_ih"][1] != width
        or shapes["b"] != (width,)
    ):
        raise ValueError(
            f"params: expected w_ih (F, {width}), w_hh {recurrent_shape} and b ({width},) for {cell!r}, "
            f"got {shapes}; {remedy}"
        )
