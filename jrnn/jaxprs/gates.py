"""The gates of an affine step as a function of arrays, and the gate inputs as parts of products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jrnn.jaxprs.blocks import EVERY, Elementwise, Gate, Piece, Refusal, Reset, State, Sum
from jrnn.jaxprs.flat import Const, Shaped, apply_elementwise, broadcast, flatten
from jrnn.jaxprs.recipes import INPUT, INVARIANT, Atom, Dot, Recipe, total

__all__ = ["Gates", "Parts", "assemble", "is_not_zero"]


@dataclass(frozen=True)
class Gates:
    """The elementwise part of a step: computes each new leaf of the state from arrays that broadcast to its shape.

    ``ops`` are elementwise operations and their operands: ``("u", i)``, ``("v", i)``, ``("sum", i)`` for ``u + v``,
    ``("theta", i)``, ``("state", i)``, ``("const", Const)`` or ``("op", j, which)``, a result of an earlier operation.
    ``leaves`` are references of the same kind. ``summed`` says of each gate whether it uses only ``u + v``.
    """

    ops: tuple[tuple[Any, tuple[Any, ...]], ...]
    leaves: tuple[Any, ...]
    summed: tuple[bool, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.ops, self.leaves, self.summed))

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, theta: Any, u: Any, v: Any, state: Any) -> list[Any]:
        """The new leaves. Arrays may have any layout, since every operation is elementwise."""
        given = {"u": u, "v": v, "theta": theta, "state": state}
        results: list[Any] = []

        def read(reference: Any) -> Any:
            kind, at, *rest = reference
            if kind == "op":
                return results[at][rest[0]]
            if kind == "const":
                return at.value
            return u[at] + v[at] if kind == "sum" else given[kind][at]

        for made, operands in self.ops:
            results.append(apply_elementwise(made.op, [read(r) for r in operands]))
        shape = np.shape(state[0])
        return [broadcast(read(r), shape) for r in self.leaves]


class Parts(NamedTuple):
    """The gate inputs, with one entry for each gate.

    ``u``: a `Sum` that does not depend on the state, or None for zeros. ``v``: the pieces of products of the state
    whose sum it is, empty for zeros. ``theta``: recipes of vectors ``(H)`` or scalars, shared by all gates.
    """

    u: tuple[Sum | None, ...]
    v: tuple[tuple[Piece, ...], ...]
    theta: tuple[Recipe, ...]

    def input_product(self, kinds: Any) -> tuple[tuple[Recipe, ...], Any, tuple[Recipe | None, ...]] | None:
        """``(xs, weights, biases)`` if each input part is a sum of products and one bias; else None.

        ``xs`` are the recipes of the vectors, of which there are none if the step multiplies only its state.
        ``weights[g][i]`` are the pieces with ``xs[i]`` in the sum of gate g.
        """
        sums = [Sum((), None, 0) if u is None else u for u in self.u]
        xs = tuple(dict.fromkeys(piece.vector for u in sums for piece in u.pieces))
        vectors = all(u.known is None or (u.known.kind(kinds) == INVARIANT and len(u.known.shape) <= 1) for u in sums)
        if not vectors:
            return None
        weights = tuple(tuple(tuple(p for p in u.pieces if p.vector == x) for x in xs) for u in sums)
        return xs, weights, tuple(u.known for u in sums)  # type: ignore[return-value]

    def inputs(self, kinds: Any) -> tuple[tuple[Recipe | None, ...], tuple[Recipe | None, ...]]:
        """The input part of each gate, as the sum of a recipe and a bias, each of which may be None."""
        each = [_parted(u, kinds) for u in self.u]
        return tuple(given for given, _ in each), tuple(bias for _, bias in each)


def _parted(e: Sum | None, kinds: Any) -> tuple[Recipe | None, Recipe | None]:
    """A sum that does not depend on the state, without its bias; and the bias, the same vector at every step."""
    terms = [] if e is None else list(recipe(e).summands())
    is_bias = [term.kind(kinds) == INVARIANT and len(term.shape) <= 1 for term in terms]
    given, biases = ([t for t, b in zip(terms, is_bias, strict=True) if b == wanted] for wanted in (False, True))
    return total(given) if given else None, total(biases) if biases else None


def recipe(e: Sum) -> Recipe:
    """The recipe of a sum that does not depend on the state."""
    terms: list[Recipe] = [Dot(p.vector, p.weights.columns(p.start, p.stop)) for p in e.pieces]  # type: ignore[arg-type]
    return total(terms if e.known is None else [*terms, e.known])


def assemble(
    new: Sequence[Any], leaves: Sequence[int], units: int, dtype: Any, kinds: Any, coupled: bool
) -> tuple[Gates, Parts, int]:
    """The gates that compute the expressions, their inputs, and the leaf of the carry that the matmul takes.

    Each distinct sum of products is a gate. It takes ``u + v`` if the columns of ``h W`` occur in no other sum and if u
    changes from step to step. Otherwise it takes u and v separately. If the step is not ``coupled``, it has no
    recurrent matmul, and each gate takes ``u + v`` with no pieces for v; the leaf returned is the first.

    Raises:
      Refusal: the step has no recurrent matmul, unless it is not ``coupled``, or it has matmuls of several leaves.
    """
    # Columns of the same product stay in their order, so that the weights need not be rearranged.
    sums = sorted(_sums(new), key=lambda e: min((p.start for p in e.pieces if p.recurrent), default=0))
    split = [_split(e) for e in sums]
    multiplied = {piece.vector.leaf for pieces, _ in split for piece in pieces}  # type: ignore[union-attr]
    if not multiplied and coupled:
        raise Refusal("it has no product of its state with weights")
    if len(multiplied) > 1:
        raise Refusal("it has products of several leaves of its state")
    for e, (pieces, _) in zip(sums, split, strict=True):
        if pieces and e.width != units:
            raise Refusal(f"it uses {e.width} columns of a product at once, where its state has {units} units")

    used = [pieces for pieces, _ in split if pieces]
    together: list[tuple[Sum, tuple[Piece, ...]]] = []
    alone_u: list[Sum] = []
    alone_v: list[tuple[Piece, ...]] = []
    theta: list[Recipe] = []
    roles: list[Any] = []
    for pieces, rest in split:
        alone = used.count(pieces) == 1 if pieces else not multiplied
        if alone and rest is not None and _changes(rest, kinds):
            together.append((rest, pieces))
            roles.append(("sum", len(together) - 1))
        else:
            v = ("v", _index(alone_v, pieces)) if pieces else None
            roles.append((_place(rest, alone_u, theta, kinds), v))
    first = len(together)
    count = first + max(len(alone_u), len(alone_v))

    def shifted(reference: Any) -> Any:
        return (reference[0], first + reference[1]) if reference and reference[0] in "uv" else reference

    ops: list[Any] = []
    done: dict[Any, Any] = {}

    def operation(made: Any, operands: tuple[Any, ...], which: int = 0) -> Any:
        return ("op", _index(ops, (made, operands)), which)

    def write(e: Any) -> Any:
        if e not in done:
            done[e] = written(e)
        return done[e]

    def written(e: Any) -> Any:
        if isinstance(e, State | Reset):
            return ("state", leaves.index(e.leaf))
        if isinstance(e, Gate):
            return operation(e.op, tuple(map(write, e.args)), e.which)
        role = roles[sums.index(e)]
        if role[0] == "sum":
            return role
        place, v = map(shifted, role)
        return operation(_addition(dtype), (v, place)) if place and v else place or v

    gates = tuple(map(write, new))
    parts = Parts(
        (*(u for u, _ in together), *alone_u, *(None,) * (count - first - len(alone_u))),
        (*(v for _, v in together), *alone_v, *((),) * (count - first - len(alone_v))),
        tuple(theta),
    )
    hidden = multiplied.pop() if multiplied else leaves[0]
    return Gates(tuple(ops), gates, (True,) * first + (False,) * (count - first)), parts, hidden


def _sums(expressions: Sequence[Any]) -> list[Sum]:
    """The distinct sums in expressions, in order of their first occurrence."""
    found: dict[Sum, None] = {}
    seen: set[int] = set()

    def visit(e: Any) -> None:
        if isinstance(e, Sum):
            found.setdefault(e)
        elif isinstance(e, Gate) and id(e) not in seen:
            seen.add(id(e))
            for arg in e.args:
                visit(arg)

    for e in expressions:
        visit(e)
    return list(found)


def _split(e: Sum) -> tuple[tuple[Piece, ...], Sum | None]:
    """The pieces of products of the state in a sum, in a canonical order, and the rest of the sum."""
    pieces = tuple(sorted((p for p in e.pieces if p.recurrent), key=repr))
    rest = tuple(p for p in e.pieces if not p.recurrent)
    return pieces, Sum(rest, e.known, e.width) if rest or e.known is not None else None


def _changes(e: Sum, kinds: Any) -> bool:
    """Whether a sum is anything other than a vector that is the same at every step."""
    return bool(e.pieces) or (e.known is not None and (e.known.kind(kinds) == INPUT or len(e.known.shape) > 1))


def _place(e: Sum | None, alone: list[Sum], theta: list[Recipe], kinds: Any) -> Any:
    """The reference by which gates use a sum that does not depend on the state and is not added to a product."""
    if e is None:
        return None
    if _changes(e, kinds):
        return ("u", _index(alone, e))
    if isinstance(e.known, Atom) and not isinstance(e.known.value, int):
        return ("const", e.known.value)
    return ("theta", _index(theta, e.known))


def _index(items: list[Any], item: Any) -> int:
    if item not in items:
        items.append(item)
    return items.index(item)


@functools.lru_cache(maxsize=4)
def _addition(dtype: Any) -> Elementwise:
    form = jax.ShapeDtypeStruct((), dtype)
    return Elementwise(flatten(jax.make_jaxpr(jax.lax.add)(form, form))[0].ops[0], (dtype,))


def is_not_zero(number: Sum, dtype: Any) -> Gate:
    """The flags of which numbers are not zero."""
    zero = Atom(Const(np.zeros((), dtype), Shaped(((), np.dtype(dtype), False))), ())
    return Gate(_comparison(dtype), (number, Sum((), zero, EVERY)), 0, number.width)


@functools.lru_cache(maxsize=4)
def _comparison(dtype: Any) -> Elementwise:
    form = jax.ShapeDtypeStruct((), dtype)
    return Elementwise(flatten(jax.make_jaxpr(jax.lax.ne)(form, form))[0].ops[0], (np.dtype(bool),))
