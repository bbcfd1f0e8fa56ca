"""The form of a step: what is known of it, as one value. Schedules ask the form, and wrappers map a form to a form.

A form is a pytree. Its arrays are leaves, and what is static about the step is part of its tree, hashed by value.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jrnn.cells.base import product, side_by_side, vector

__all__ = ["AffineForm", "Gates", "LinearForm", "ReadGates", "gate_tuple"]


@dataclass(frozen=True)
class Gates:
    """The gates of an affine step, and what is promised of them.

    ``combine(theta, u, v, state, key)`` gives the new state; it is hashed and compared by value. ``sums`` says of each
    gate whether it uses only ``u + v``. ``elementwise`` says that unit j of the new state depends on unit j of the
    arguments alone. None, for a gate or for ``elementwise``, promises nothing (see `jrnn.schedules.promises`).
    ``draws`` says that ``combine`` uses its key. ``linear`` says that each field of the new state is ``a * field + b``,
    element by element, with ``a`` and ``b`` functions of theta, u and v.
    """

    combine: Callable[[Any, Any, Any, Any, Any], Any]
    sums: tuple[bool | None, ...]
    elementwise: bool | None = None
    draws: bool = False
    linear: bool = False


@dataclass(frozen=True)
class ReadGates:
    """Gates that were read from a step, `jrnn.jaxprs.gates.Gates`, to combine; theta is a tuple of vectors."""

    program: Any

    def __call__(self, theta: Any, u: Any, v: Any, state: Any, key: Any) -> Any:
        return type(state)(*self.program(theta, u, v, tuple(state)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("cell",))
@dataclass(frozen=True, eq=False)
class LinearForm:
    """A step ``h = a * h + b``, whose coefficients a `jrnn.LinearCell` makes of its parameters."""

    cell: Any
    params: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "w_hh", "theta", "input_mask", "mask"),
    meta_fields=("gates", "emits", "projection"),
)
@dataclass(frozen=True, eq=False)
class AffineForm:
    """A step of two matrix products and a function of gates::

        u = (x * input_mask) w_ih + b         or projection(inputs, x * input_mask), where the cell has its own
        v = (h * mask) w_hh
        state = gates.combine(theta, u, v, state, key)
        y = the fields ``emits`` of the state, side by side

    ``u`` and ``v`` are one array ``(*B, H)`` a gate. ``inputs`` is ``(w_ih (F, G*H), b (G*H,))``, or whatever
    ``projection`` takes. If ``w_ih`` is None, x takes the place of the product: ``(*B, G*H)``. ``w_hh`` is
    ``(H, G*H)`` and ``theta`` a pytree of vectors ``(H,)``. The masks ``(*B, F)`` and ``(*B, H)`` are None where
    nothing is masked.

    ``w_hh`` is ``(H, 0)`` where a step has no recurrent product. Then ``v`` is zero, every gate takes ``u + v``, and no
    unit depends on another.
    """

    gates: Gates
    emits: tuple[str, ...]
    inputs: Any
    w_hh: jax.Array
    theta: Any
    input_mask: Any = None
    mask: Any = None
    projection: Callable[[Any, jax.Array], Any] | None = None

    @property
    def hidden(self) -> int:
        return self.w_hh.shape[0]

    @property
    def coupled(self) -> bool:
        """Whether there is a recurrent product."""
        return self.w_hh.shape[1] > 0

    @property
    def given(self) -> bool:
        """Whether x is the input parts of the gates, up to the bias, and not multiplied by weights."""
        return self.projection is None and self.inputs[0] is None

    @property
    def count(self) -> int:
        """The number of gates."""
        return len(self.gates.sums)

    def masked(self, input_mask: Any = None, mask: Any = None) -> AffineForm:
        """The form with further masks; None masks nothing."""
        of = lambda old, new: old if new is None else new if old is None else old * new
        return replace(self, input_mask=of(self.input_mask, input_mask), mask=of(self.mask, mask))

    def entering(self, xs: jax.Array) -> jax.Array:
        """``x * input_mask``, of one step or of several."""
        return xs if self.input_mask is None else xs * vector(self.input_mask, xs)

    def project(self, xs: jax.Array) -> tuple[jax.Array, ...]:
        """``u``, one array a gate, of one step or of several in one product."""
        xs = self.entering(xs)
        if self.projection is not None:
            return tuple(self.projection(self.inputs, xs))
        w_ih, b = self.inputs
        u = xs if w_ih is None else product(xs, w_ih)
        return self.split(u + vector(b, u))

    def split(self, z: jax.Array) -> tuple[jax.Array, ...]:
        """``(..., G*H)`` as one ``(..., H)`` array a gate."""
        return tuple(jnp.split(z, self.count, axis=-1))

    def fields(self, state: Any) -> tuple[jax.Array, ...]:
        """The fields of a state that are put out."""
        return tuple(getattr(state, name) for name in self.emits)

    def output(self, state: Any) -> jax.Array:
        return side_by_side(self.fields(state))


@functools.cache
def gate_tuple(names: tuple[str, ...]) -> Any:
    """The named tuple of one array a gate; the same type for the same names."""
    try:
        return namedtuple("GateTuple", names)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"gate_names: expected a tuple of different names, each a Python identifier that does not begin with an "
            f"underscore, got {names!r} ({error})"
        ) from error
