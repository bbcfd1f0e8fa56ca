"""Splits a step into two parts, of which the second needs the first, and not the other way round.

A carry may hold more than the state of one recurrent cell. Leaves that do not depend on the state, such as a counter, a
random key or a running mean of the inputs, are computed by a loop of their own, *before* that of the cell. Leaves that
the cell does not depend on, such as a sum over its outputs or the state of a second layer, are computed by a loop of
their own *behind* it. What the rest needs of the first part is an input of its steps like any other::

    (consts, carry, x) -> (carry, y)     is     first: (consts, own leaves, x) -> (own leaves, given, some of y)
                                         and    rest:  (consts, other leaves, (given, x)) -> (other leaves, y)

Operations that cannot run for all steps at once, such as branches and loops, are moved before the cell unless they need
its state, and else behind it unless it needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Const, Op, Program, contraction, mappable

__all__ = ["Split", "before", "behind"]


@dataclass(frozen=True)
class Split:
    """A step in two parts. All fields follow from the program, and from whether the cell is the first part.

    ``fixed`` are the leaves of the carry that no step changes: both parts take them as further constants. ``own`` are
    the leaves that the first part computes, ``others`` those of the rest. ``given`` is the number of values that the
    first part gives to the rest at each step. ``early`` are the outputs of the step that the first part computes.
    """

    program: Program
    consts: int
    carry: int
    behind: bool
    fixed: tuple[int, ...] = field(compare=False)
    own: tuple[int, ...] = field(compare=False)
    others: tuple[int, ...] = field(compare=False)
    given: int = field(compare=False)
    early: tuple[int, ...] = field(compare=False)
    first: Program = field(compare=False)
    rest: Program = field(compare=False)

    @property
    def description(self) -> str:
        """The part that is not the cell, as a clause."""
        leaves, part = (self.others, self.rest) if self.behind else (self.own, self.first)
        forms = [self.program.forms[self.consts + i] for i in leaves]
        shown = " and ".join(f"{form.dtype}{list(form.shape)}" for form in forms)
        moved = sorted({op.name for op in part.ops if not mappable(part, op)})
        parts = ", ".join([*([f"{shown} of its carry"] if leaves else []), *map(repr, moved)])
        if self.behind:
            return f"what the cell does not need runs after it ({parts})"
        return f"what needs no state of the cell runs first as a scan ({parts})"


def before(program: Program, consts: int, carry: int) -> Split:
    """A step ``(consts, carry, x) -> (carry, y)`` as what does not depend on the state of its cells, and the rest.

    Raises:
      Refusal: there is nothing that can run first.
    """
    leaves = _Leaves(program, consts, carry)
    state = leaves.state
    own = tuple(i for i in leaves.changing if state and not leaves.closure[i] & state)
    stateful = sum(1 << i for i in leaves.changing if i not in own)
    new = {a for i in own if isinstance(a := program.results[i], int) and a >= program.inputs and leaves.dynamic[a]}

    def given(op: Op, used: set[int]) -> set[int]:
        if not leaves.dynamic[op.outs[0]] or leaves.reaches[op.outs[0]] & stateful:
            return set()
        return used & new if mappable(program, op) else used

    found = _split(leaves, own, (), given, behind=False)
    if not own and not found.given:
        raise Refusal("nothing of it can run first")
    return found


def behind(program: Program, consts: int, carry: int) -> Split:
    """A step ``(consts, carry, x) -> (carry, y)`` as one of its cells, and what this cell does not depend on.

    Raises:
      Refusal: there is nothing that can run last.
    """
    leaves = _Leaves(program, consts, carry)
    own = leaves.source
    needed = _ancestors(program, [program.results[i] for i in own])
    others = {consts + i for i in leaves.changing if i not in own}
    late = [a in others for a in range(len(program.forms))]
    for op in program.ops:
        stays = not leaves.reaches[op.outs[0]] or id(op) in needed or mappable(program, op)
        for out in op.outs:
            late[out] = not stays or any(late[a] for a in op.ins if isinstance(a, int))
    early = tuple(i for i, a in enumerate(program.results[carry:]) if not (isinstance(a, int) and late[a]))
    if not own or not any(late):
        raise Refusal("nothing of it can run last")

    def given(op: Op, used: set[int]) -> set[int]:
        return used if leaves.dynamic[op.outs[0]] and not late[op.outs[0]] else set()

    return _split(leaves, own, early, given, behind=True)


def _split(
    leaves: _Leaves,
    own: tuple[int, ...],
    early: tuple[int, ...],
    given: Callable[[Op, set[int]], set[int]],
    behind: bool,
) -> Split:
    """The split with these leaves and outputs in the first part.

    ``given(op, used)`` are the results of an operation that the rest takes from the first part, among those it uses.
    """
    program, consts, carry = leaves.program, leaves.consts, leaves.carry
    others = tuple(i for i in leaves.changing if i not in own)
    outputs = program.results[carry:]
    late = [a for i, a in enumerate(outputs) if i not in early]
    found: set[int] = set()
    wanted = _variables([*(program.results[i] for i in others), *late])
    for op in reversed(program.ops):
        if used := wanted.intersection(op.outs):
            taken = given(op, used)
            found |= taken
            if used - taken:
                wanted |= _variables(op.ins)
    order = tuple(sorted(found | wanted & {consts + i for i in own}))
    constants = (*range(consts), *(consts + i for i in leaves.fixed))
    xs = tuple(range(consts + carry, program.inputs))
    first = restricted(
        program,
        (*constants, *(consts + i for i in own), *xs),
        (*(program.results[i] for i in own), *order, *(outputs[i] for i in early)),
    )
    rest = restricted(
        program,
        (*constants, *(consts + i for i in others), *order, *xs),
        (*(program.results[i] for i in others), *late),
    )
    return Split(program, consts, carry, behind, leaves.fixed, own, others, len(order), early, first, rest)


def restricted(program: Program, inputs: Sequence[int], results: Sequence[int | Const]) -> Program:
    """The program of some results as a function of some variables, from which all that is needed can be computed."""
    wanted, ops = _variables(results), []
    for op in reversed(program.ops):
        if wanted.intersection(op.outs) - set(inputs):
            wanted |= _variables(op.ins)
            ops.append(op)
    forms = [program.forms[a] for a in inputs]
    number = {a: i for i, a in enumerate(inputs)}
    made = []
    for op in reversed(ops):
        ins = tuple(number[a] if isinstance(a, int) else a for a in op.ins)
        outs = tuple(range(len(forms), len(forms) + len(op.outs)))
        forms += [program.forms[out] for out in op.outs]
        for out, new in zip(op.outs, outs, strict=True):
            number.setdefault(out, new)
        made.append(Op(op.primitive, op.params, ins, outs, op.inner, op.derivative, op.effects))
    new_results = tuple(number[a] if isinstance(a, int) else a for a in results)
    return Program(len(inputs), tuple(made), new_results, tuple(forms))


def _variables(atoms: Iterable[int | Const]) -> set[int]:
    return {a for a in atoms if isinstance(a, int)}


def _ancestors(program: Program, atoms: Iterable[int | Const]) -> set[int]:
    """The ids of the operations that the atoms depend on."""
    wanted, found = _variables(atoms), set()
    for op in reversed(program.ops):
        if wanted.intersection(op.outs):
            wanted |= _variables(op.ins)
            found.add(id(op))
    return found


class _Leaves:
    """How the leaves of the carry of a step depend on each other. Sets of leaves are numbers, with a bit for each leaf.

    ``changing`` are the leaves that some step changes, and ``fixed`` the others. ``dynamic`` says of each variable
    whether it can differ from step to step. ``reaches`` has the changing leaves that each variable depends on,
    ``products`` those that it depends on through a matmul. ``closure`` has, for each leaf, all leaves that its values
    at later steps depend on. ``state`` are the leaves with a recurrent matmul. If there are none, the state is all
    leaves that have the largest size and are floats or complex numbers.
    """

    def __init__(self, program: Program, consts: int, carry: int) -> None:
        self.program, self.consts, self.carry = program, consts, carry
        results = program.results[:carry]
        self.changing = tuple(i for i in range(carry) if results[i] != consts + i)
        self.fixed = tuple(i for i in range(carry) if results[i] == consts + i)
        self._follow()
        of = lambda sets, i: sets[a] if isinstance(a := results[i], int) else 0
        self.closure = {i: (1 << i) | of(self.reaches, i) for i in self.changing}
        for _ in self.changing:
            for i in self.changing:
                for j in self.changing:
                    if self.closure[i] >> j & 1:
                        self.closure[i] |= self.closure[j]
        self.state = 0
        for i in self.changing:
            through = of(self.products, i)
            self.state |= sum(1 << j for j in self.changing if through >> j & 1 and self.closure[j] >> i & 1)
        if not self.state:
            forms = {i: program.forms[consts + i] for i in self.changing}
            size = {i: int(np.prod(form.shape)) for i, form in forms.items()}
            floats = [i for i, form in forms.items() if isinstance(form.dtype, np.dtype) and form.dtype.kind in "fc"]
            self.state = sum(1 << i for i in floats if size[i] == max(size[j] for j in floats))

    def _follow(self) -> None:
        program, fixed = self.program, {self.consts + i for i in self.fixed}
        count = len(program.forms)
        self.dynamic = [self.consts <= a < program.inputs and a not in fixed for a in range(count)]
        self.reaches, self.products = [0] * count, [0] * count
        for i in self.changing:
            self.reaches[self.consts + i] = 1 << i
        for op in program.ops:
            atoms = [a for a in op.ins if isinstance(a, int)]
            reached = functools.reduce(int.__or__, (self.reaches[a] for a in atoms), 0)
            multiplied = functools.reduce(int.__or__, (self.products[a] for a in atoms), 0)
            if contraction(program, op) is not None:
                multiplied |= reached
            for out in op.outs:
                self.dynamic[out] = any(self.dynamic[a] for a in atoms)
                self.reaches[out], self.products[out] = reached, multiplied

    @property
    def source(self) -> tuple[int, ...]:
        """The leaves of one cell that depends on no other cell, with all leaves that it depends on."""
        for i in self.changing:
            other = [j for j in self.changing if self.closure[i] & self.state >> j & 1]
            if self.state >> i & 1 and all(self.closure[j] >> i & 1 for j in other):
                return tuple(j for j in self.changing if self.closure[i] >> j & 1)
        return ()
