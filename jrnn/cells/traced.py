"""A cell whose gates were read from somebody's traced step (see `jrnn.jaxprs.affine`)."""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jrnn.cells.base import Cell, output, product
from jrnn.jaxprs.flat import broadcast

__all__ = ["TracedCell"]


@dataclass(frozen=True, repr=False)
class TracedCell(Cell):
    """An affine cell: the products are the library's, the gates a program.

    Parameters are ``{"w_ih" (F, G*H), "b" (G*H,), "w_hh" (H, G*H), "theta": {name: (H,)}, "restart": fields}``. With
    ``projected`` they have no ``w_ih`` and ``b``, and the inputs are ``(T, *B, G*H)``, what each gate is given.
    """

    gates: Any
    hidden: int
    field: int
    projected: bool
    emitted: tuple[int, ...]

    uses_key = False
    is_affine: ClassVar[bool] = True
    elementwise: ClassVar[bool | None] = True
    additive: ClassVar[Any] = ()
    draws_at_steps: ClassVar[bool] = False

    @property
    def sums(self) -> tuple[bool, ...]:
        return self.gates.summed

    @property
    def emits(self) -> tuple[str, ...]:
        names = self.state_type._fields
        return tuple(names[i] for i in self.emitted)

    @property
    def state_type(self) -> Any:
        return _state_type(len(self.gates.leaves), self.field)

    @property
    def hoistable(self) -> bool:
        return True

    def initial_state(self, params: Any, batch_shape: tuple[int, ...]) -> Any:
        """What a reset restores."""
        dtype, shape = params["w_hh"].dtype, (*batch_shape, self.hidden)
        if not params["restart"]:
            return self.state_type(*(jnp.zeros(shape, dtype),) * len(self.gates.leaves))
        return self.state_type(*(broadcast(value, shape) for value in params["restart"]))

    def theta(self, params: Any) -> Any:
        return params["theta"]

    def project(self, params: Any, xs: jax.Array) -> tuple[jax.Array, ...]:
        if self.projected:
            return self.split(xs)
        u = product(xs, params["w_ih"])
        return self.split(u + broadcast(params["b"], u.shape))

    def split(self, z: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(z, len(self.sums), axis=-1))

    def input_weights(self, params: Any) -> Any:
        return None if self.projected else (params["w_ih"], params["b"])

    def recurrent_weights(self, params: Any) -> jax.Array:
        return params["w_hh"]

    def recurrent_mask(self, params: Any) -> None:
        return None

    def entering(self, params: Any, xs: jax.Array) -> jax.Array:
        return xs

    def combine(self, theta: Any, u: Any, v: Any, state: Any, key: Any) -> Any:
        vectors = tuple(theta[name] for name in sorted(theta, key=int))
        return self.state_type(*self.gates(vectors, u, v, tuple(state)))

    def update(self, params: Any, state: Any, p: Any, key: Any = None) -> tuple[Any, jax.Array]:
        v = self.split(product(state.h, params["w_hh"]))
        state = self.combine(params["theta"], p, v, state, key)
        return state, output(self, state)


@functools.lru_cache(maxsize=64)
def _state_type(count: int, hidden: int) -> Any:
    """A NamedTuple of so many fields, of which one is ``h``; the same type for the same numbers."""
    return namedtuple("State", [f"s{i}" if i != hidden else "h" for i in range(count)])
