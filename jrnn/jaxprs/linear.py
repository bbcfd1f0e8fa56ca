"""Reads the linear form of a recurrent step: every leaf of its carry becomes ``a * leaf + b``, element by element.

``a`` and ``b`` depend on constants and on the input of the step, and not on the state. The state is followed to the new
carry through operations that are linear in it: sums, products and quotients with state-independent operands, and
selections by state-independent flags. A selection that replaces the state is a *reset*: there ``a`` is 0, and the
state before it must not be multiplied at all, since it may be infinite or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.dependence import Dependence
from jrnn.jaxprs.flat import Const, Op, Program, apply_elementwise, reading
from jrnn.jaxprs.primitives import primitive
from jrnn.jaxprs.recipes import INVARIANT, STATE

__all__ = ["Coefficient", "Linear", "Recurrence", "make", "read"]

DEEPEST = 200  # the largest depth of coefficients that are functions of other coefficients


@dataclass(frozen=True, eq=False)
class Coefficient:
    """A state-independent array: ``function`` of other coefficients, or of variables and literals of the program."""

    function: Callable[..., Any]
    operands: tuple[Coefficient | int | Const, ...]
    kind: int
    depth: int = 0

    def variables(self) -> Iterator[int]:
        """The variables of the program that it depends on."""
        seen, todo = set(), [self]
        while todo:
            for operand in todo.pop().operands:
                if isinstance(operand, Coefficient) and id(operand) not in seen:
                    seen.add(id(operand))
                    todo.append(operand)
                elif isinstance(operand, int):
                    yield operand


def make(coefficient: Coefficient, env: dict[int, Any], made: dict[int, Any]) -> Any:
    """The array, given the values of the program's variables. ``made`` holds the coefficients computed so far."""
    if id(coefficient) not in made:
        values = [
            make(operand, env, made)
            if isinstance(operand, Coefficient)
            else env[operand]
            if isinstance(operand, int)
            else operand.value
            for operand in coefficient.operands
        ]
        made[id(coefficient)] = coefficient.function(*values)
    return made[id(coefficient)]


class Recurrence(NamedTuple):
    """``leaf -> a * leaf + b``, or only ``b`` where ``reset`` holds; ``a`` is 0 there.

    ``a`` is None if it is 1 everywhere, ``b`` is None if it is 0 everywhere, and ``reset`` is None if it never holds.
    """

    leaf: int
    a: Coefficient | None = None
    b: Coefficient | None = None
    reset: Coefficient | None = None


@dataclass(frozen=True)
class Linear:
    """The linear form of a step.

    ``leaves`` are the leaves of the carry that change, and ``recurrences`` has one entry for each. ``fixed`` are the
    leaves that no step changes. ``kinds`` has the kind of each variable: invariant, or dependent on the input or on the
    state. ``after`` are the variables of the loop that the outputs are computed from (see `Dependence.after`).

    Forms are compared by their program, from which all other fields follow.
    """

    program: Program
    consts: int
    carry: int
    leaves: tuple[int, ...] = field(compare=False)
    fixed: tuple[int, ...] = field(compare=False)
    kinds: tuple[int, ...] = field(compare=False)
    recurrences: tuple[Recurrence, ...] = field(compare=False)
    after: dict[int, tuple[int, bool]] = field(compare=False)

    @property
    def outputs(self) -> tuple[int | Const, ...]:
        return self.program.results[self.carry :]

    @property
    def resets(self) -> bool:
        """Whether flags of the step replace its state."""
        return any(r.reset is not None for r in self.recurrences)


def read(program: Program, consts: int, carry: int) -> Linear:
    """The linear form of a step ``(consts, carry, x) -> (carry, y)``.

    Args:
      program: the step.
      consts, carry: the number of its inputs that are constants, and the number of leaves of the carry after these.

    Raises:
      Refusal: the step has no linear form, with the reason.
    """
    with reading():
        return _Reader(program, consts, carry).read()


class _Reader(Dependence):
    def __init__(self, program: Program, consts: int, carry: int) -> None:
        super().__init__(program, consts, carry)
        for i in self.leaves:
            dtype = program.forms[consts + i].dtype
            if not isinstance(dtype, np.dtype) or dtype.kind not in "fc" or dtype.itemsize < 4:
                raise Refusal(f"a leaf of its carry that changes is {dtype}, where 32 bits or more of a float are read")
        self.values = {consts + i: Recurrence(i) for i in self.leaves}

    def read(self) -> Linear:
        results = self.program.results
        needed = self.needed(results[i] for i in self.leaves)
        for op in self.program.ops:
            if self.kinds[op.outs[0]] == STATE and id(op) in needed:
                self.values[op.outs[0]] = self._follow(op)
        found = tuple(self._recurrence(results[i], i) for i in self.leaves)
        self.check_inputs()
        after = self.after([results[i] for i in self.leaves])
        return Linear(self.program, self.consts, self.carry, self.leaves, self.fixed, tuple(self.kinds), found, after)

    def _recurrence(self, atom: int | Const, i: int) -> Recurrence:
        if self.kind(atom) != STATE:
            raise Refusal("a leaf of its new carry does not depend on the one before")
        found = self.values[atom]  # type: ignore[index]
        if found.leaf != i:
            raise Refusal("leaves of its carry change places")
        return found

    # --- following operations ---

    def _follow(self, op: Op) -> Recurrence:
        followed = [at for at, a in enumerate(op.ins) if self.kind(a) == STATE]
        values = [self.values[op.ins[at]] for at in followed]  # type: ignore[index]
        if len({value.leaf for value in values}) > 1:
            raise Refusal("a leaf of its new carry depends on another leaf")
        if self.shape(op.outs[0]) != self.program.forms[self.consts + values[0].leaf].shape:
            raise Refusal("its state changes its shape on the way to the next")
        row = primitive(op.name)
        same = self.program.form(op.ins[0])[1] == self.program.form(op.outs[0])[1]
        if op.name in ("copy", "copy_p") or (op.name == "convert_element_type" and same):
            return values[0]
        if op.name == "select_n" and followed[0] > 0 and len(op.ins) == 3:
            return self._selected(op)
        if op.name in ("add", "add_any", "sub"):
            return self._sum(op)
        if row.elementwise and len(followed) == 1 and followed[0] in row.linear and same:
            return self._scaled(op, followed[0], values[0])
        raise Refusal(f"its next state depends on {op.name!r} of its state, which is not linear")

    def _scaled(self, op: Op, place: int, value: Recurrence) -> Recurrence:
        """An operation that is linear in one operand, applied to ``a * leaf + b``: it applies to ``a`` and to ``b``."""

        def of(coefficient: Coefficient) -> Coefficient:
            operands = (*op.ins[:place], coefficient, *op.ins[place + 1 :])
            return self._made(lambda *args: apply_elementwise(op, args)[0], *operands)

        one = Coefficient(lambda: jnp.ones((), self.program.form(op.outs[0]).dtype), (), INVARIANT)
        b = None if value.b is None else of(value.b)
        return value._replace(a=of(one if value.a is None else value.a), b=b)

    def _sum(self, op: Op) -> Recurrence:
        """A sum or a difference of which one operand, or both, depend on the state."""
        terms: list[Any] = []
        for atom in op.ins:
            known = self._made(lambda v: v, atom) if self.kind(atom) != STATE else None
            terms.append((None, known) if known is not None else self.values[atom][1:3])  # type: ignore[index]
        states = [self.values[a] for a in op.ins if self.kind(a) == STATE]  # type: ignore[index]
        dtype = self.program.form(op.outs[0]).dtype
        one = Coefficient(lambda: jnp.ones((), dtype), (), INVARIANT)
        a: list[Coefficient | None] = []
        for atom, (factor, _) in zip(op.ins, terms, strict=True):
            a.append(None if self.kind(atom) != STATE else one if factor is None else factor)
        if a[1] is None and states[0].a is None:
            factor = None
        else:
            factor = self._combined(op, *a)
        resets = [value.reset for value in states]
        reset = None
        if all(r is not None for r in resets):
            reset = resets[0] if len(resets) == 1 else self._made(jnp.logical_and, *resets)  # type: ignore[arg-type]
        return Recurrence(states[0].leaf, factor, self._combined(op, *(b for _, b in terms)), reset)

    def _combined(self, op: Op, left: Coefficient | None, right: Coefficient | None) -> Coefficient | None:
        """The sum or difference of two coefficients, where None stands for 0."""
        if right is None:
            return left
        if left is None:
            return self._made(lax.neg, right) if op.name == "sub" else right
        return self._made(lambda x, y: apply_elementwise(op, (x, y))[0], left, right)

    def _selected(self, op: Op) -> Recurrence:
        """A selection by state-independent flags. It is a reset where it selects a state-independent case."""
        flags, *cases = op.ins
        if self.kind(flags) == STATE or self.program.form(flags).dtype != np.dtype(bool):
            raise Refusal("it selects by flags that depend on its state")
        dtype = self.program.form(op.outs[0]).dtype
        zero = Coefficient(lambda: jnp.zeros((), dtype), (), INVARIANT)
        one = Coefficient(lambda: jnp.ones((), dtype), (), INVARIANT)
        never = Coefficient(lambda: jnp.zeros((), bool), (), INVARIANT)
        always = Coefficient(lambda: jnp.ones((), bool), (), INVARIANT)
        parts: list[tuple[Coefficient, Coefficient, Coefficient]] = []
        leaf = -1
        for case in cases:
            if self.kind(case) == STATE:
                leaf, a, b, reset = self.values[case]  # type: ignore[index]
                parts.append((a or one, b or zero, reset or never))
            else:
                parts.append((zero, self._made(lambda v: v, case), always))
        a, b, reset = (self._made(_where, flags, on, off) for off, on in zip(*parts, strict=True))
        any_reset = any(part[2] is not never for part in parts)
        any_b = any(part[1] is not zero for part in parts)
        return Recurrence(leaf, a, b if any_b else None, reset if any_reset else None)

    def _made(self, function: Callable[..., Any], *operands: Coefficient | int | Const) -> Coefficient:
        kinds = [o.kind if isinstance(o, Coefficient) else self.kind(o) for o in operands]
        depth = 1 + max((o.depth for o in operands if isinstance(o, Coefficient)), default=0)
        if depth > DEEPEST:
            raise Refusal("its step is a chain of more operations than can be followed")
        return Coefficient(function, operands, max(kinds, default=INVARIANT), depth)


def _where(flags: Any, on: Any, off: Any) -> Any:
    """A selection whose operands are broadcast, without promotion of dtypes or ranks."""
    shape = np.broadcast_shapes(np.shape(flags), np.shape(on), np.shape(off))
    flags, on, off = (jnp.asarray(value) for value in (flags, on, off))
    spread = lambda value: lax.broadcast_in_dim(value, shape, tuple(range(len(shape) - value.ndim, len(shape))))
    return lax.select(spread(flags), spread(on), spread(off))
