"""Recipes: descriptions of the arrays that a loop takes from outside, in terms of the variables of a program.

A recipe is a value. It describes an array that does not depend on the state: a variable of the program, a part of one,
a sum or a product. Readers build recipes before anything is computed, and only arrays that are used are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.jaxprs.flat import Const, Op, Program, broadcast

__all__ = ["INPUT", "INVARIANT", "STATE", "Add", "Atom", "Dot", "Flat", "Negative", "Number", "PerSequence", "Recipe"]
__all__ += ["Take", "needed", "side_by_side", "total"]

# The kinds of variables: those that depend only on constants, on the input of the step, or on the state.
INVARIANT, INPUT, STATE = range(3)


class Recipe:
    """The description of an array; see the subclasses."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Recipe, ...]:
        """The recipes that this recipe consists of."""
        return ()

    @property
    def terms(self) -> int:
        """The number of arrays that it consists of."""
        return sum(part.terms for part in self.parts) or 1

    def make(self, env: dict[int, Any]) -> Any:
        """The array, given the values of the program's variables."""
        raise NotImplementedError

    def columns(self, start: int, stop: int) -> Recipe:
        """A range of the last axis. A scalar, or an axis that is broadcast, stays unchanged."""
        if not self.shape or (start, stop) == (0, self.shape[-1]):
            return self
        ranges = (*((0, n) for n in self.shape[:-1]), (start, stop))
        return Take(self, ranges, tuple(range(len(ranges))))

    def summands(self) -> Iterator[Recipe]:
        """The recipes whose sum it is."""
        yield self

    def atoms(self) -> Iterator[int]:
        """The variables that it needs."""
        for part in self.parts:
            yield from part.atoms()

    def kind(self, kinds: Any) -> int:
        """The kind of the array, given the kind of each variable."""
        return max((kinds[atom] for atom in self.atoms()), default=INVARIANT)


@dataclass(frozen=True)
class Atom(Recipe):
    """A variable of the program, or a literal."""

    value: int | Const
    form: tuple[int, ...]

    @classmethod
    def of(cls, program: Program, atom: int | Const) -> Atom:
        return cls(atom, program.form(atom).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form

    def make(self, env: dict[int, Any]) -> Any:
        return env[self.value] if isinstance(self.value, int) else self.value.value

    def atoms(self) -> Iterator[int]:
        if isinstance(self.value, int):
            yield self.value


@dataclass(frozen=True)
class Take(Recipe):
    """Ranges of the axes of an array, or None for an axis of size one that is dropped; then a transposition."""

    source: Recipe
    ranges: tuple[tuple[int, int] | None, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [r[1] - r[0] for r in self.ranges if r is not None]
        return tuple(sizes[i] for i in self.order)

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.source,)

    def make(self, env: dict[int, Any]) -> Any:
        a = self.source.make(env)
        bounds = [(0, 1) if r is None else r for r in self.ranges]
        if bounds != [(0, n) for n in a.shape]:
            a = jax.lax.slice(a, [low for low, _ in bounds], [high for _, high in bounds])
        a = jax.lax.squeeze(a, [i for i, r in enumerate(self.ranges) if r is None])
        return a if self.order == tuple(range(a.ndim)) else jnp.transpose(a, self.order)


@dataclass(frozen=True)
class Add(Recipe):
    """A sum. Axes of size one, and axes that are missing in front, are broadcast."""

    first: Recipe
    second: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.broadcast_shapes(self.first.shape, self.second.shape))

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.first, self.second)

    def make(self, env: dict[int, Any]) -> Any:
        a, b = self.first.make(env), self.second.make(env)
        shape = np.broadcast_shapes(np.shape(a), np.shape(b))
        return jax.lax.add(broadcast(a, shape), broadcast(b, shape))

    def columns(self, start: int, stop: int) -> Recipe:
        return Add(self.first.columns(start, stop), self.second.columns(start, stop))

    def summands(self) -> Iterator[Recipe]:
        yield from self.first.summands()
        yield from self.second.summands()


@dataclass(frozen=True)
class OfEach(Recipe):
    """An array that is computed from another one, element by element."""

    source: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.source,)

    def columns(self, start: int, stop: int) -> Recipe:
        return replace(self, source=self.source.columns(start, stop))


@dataclass(frozen=True)
class Negative(OfEach):
    """The negative of an array."""

    def make(self, env: dict[int, Any]) -> Any:
        return jax.lax.neg(self.source.make(env))


@dataclass(frozen=True)
class Number(OfEach):
    """Booleans as the numbers 0 and 1."""

    dtype: Any

    def make(self, env: dict[int, Any]) -> Any:
        return jax.lax.convert_element_type(self.source.make(env), self.dtype)


@dataclass(frozen=True)
class PerSequence(Recipe):
    """An array ``(*B)`` with a trailing axis of size one for features."""

    source: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape, 1)

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.source,)

    def make(self, env: dict[int, Any]) -> Any:
        return jax.lax.expand_dims(self.source.make(env), (len(self.source.shape),))

    def columns(self, start: int, stop: int) -> Recipe:
        return self


@dataclass(frozen=True)
class Flat(Recipe):
    """An array with its last two axes merged into one."""

    source: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, groups, width = self.source.shape
        return (*rest, groups * width)

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.source,)

    def make(self, env: dict[int, Any]) -> Any:
        return jnp.reshape(self.source.make(env), self.shape)


@dataclass(frozen=True)
class Dot(Recipe):
    """The product of ``x (*B, K)`` and ``w (K, N)``."""

    x: Recipe
    w: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.x.shape[:-1], self.w.shape[-1])

    @property
    def parts(self) -> tuple[Recipe, ...]:
        return (self.x, self.w)

    def make(self, env: dict[int, Any]) -> Any:
        x, w = self.x.make(env), self.w.make(env)
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))

    def columns(self, start: int, stop: int) -> Recipe:
        return Dot(self.x, self.w.columns(start, stop))


def total(terms: Iterable[Recipe]) -> Recipe:
    """The sum of one or more recipes."""
    return functools.reduce(Add, terms)


def side_by_side(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The arrays to concatenate along their last axis. Adjacent ranges of the same array are merged into one recipe."""
    found: list[Recipe] = []
    for recipe in recipes:
        joined = _joined(found[-1], recipe) if found else None
        if joined is None:
            found.append(recipe)
        else:
            found[-1] = joined
    return found


def _joined(a: Recipe, b: Recipe) -> Recipe | None:
    """The concatenation of two arrays, if both are adjacent ranges of the same array, or sums of such; else None."""
    if isinstance(a, Add) and isinstance(b, Add):
        first, second = _joined(a.first, b.first), _joined(a.second, b.second)
        return None if first is None or second is None else Add(first, second)
    if not (isinstance(a, Take) and isinstance(b, Take)) or a.source != b.source:
        return None
    x, y = a.ranges[-1], b.ranges[-1]
    if x is None or y is None or x[1] != y[0] or a.source.columns(*x) != a or a.source.columns(*y) != b:
        return None
    return a.source.columns(x[0], y[1])


def needed(program: Program, kinds: Any, kind: int, wanted: Iterable[Recipe | int]) -> tuple[Op, ...]:
    """The operations of a kind that recipes and variables depend on, in order."""
    names: set[int] = set()
    for item in wanted:
        names.update(item.atoms() if isinstance(item, Recipe) else (item,))
    ops = []
    for op in reversed(program.ops):
        if names.intersection(op.outs):
            names.update(a for a in op.ins if isinstance(a, int))
            if kinds[op.outs[0]] == kind:
                ops.append(op)
    return tuple(reversed(ops))
