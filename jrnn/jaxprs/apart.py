"""Splits a step into a part that does not need the state of its cell, and the rest.

A carry may hold more than the state of a recurrent cell: a counter, a random key, a running mean of the inputs. Leaves
that depend only on themselves and on the inputs are computed by a loop of their own, which runs *first*. What the rest
needs of them at each step is then an input of the *rest* like any other::

    (consts, carry, x) -> (carry, y)     is     first: (consts, own leaves, x) -> (own leaves, given)
                                         and    rest:  (consts, other leaves, (given, x)) -> (other leaves, y)

Operations that cannot run for all steps at once, such as branches and loops, are moved into the first part too, unless
they need the state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Const, Op, Program, contraction, mappable

__all__ = ["Split", "split"]


@dataclass(frozen=True)
class Split:
    """A step in two parts. All fields follow from the program.

    ``own`` are the leaves of the carry that the first part computes, ``others`` those of the rest. ``given`` is the
    number of values that the first part gives to the rest at each step.
    """

    program: Program
    consts: int
    carry: int
    own: tuple[int, ...] = field(compare=False)
    others: tuple[int, ...] = field(compare=False)
    given: int = field(compare=False)
    first: Program = field(compare=False)
    rest: Program = field(compare=False)

    @property
    def description(self) -> str:
        """The first part, as a clause."""
        forms = [self.program.forms[self.consts + i] for i in self.own]
        leaves = " and ".join(f"{form.dtype}{list(form.shape)}" for form in forms)
        moved = sorted({op.name for op in self.first.ops if not mappable(self.first, op)})
        parts = [f"{leaves} of its carry"] if leaves else []
        return f"what needs no state of the cell runs first as a scan ({', '.join([*parts, *map(repr, moved)])})"


def split(program: Program, consts: int, carry: int) -> Split:
    """The two parts of a step ``(consts, carry, x) -> (carry, y)``.

    Raises:
      Refusal: there is nothing that can run first.
    """
    reaches, products = _dependences(program, consts, carry)
    own = _own(program, consts, carry, reaches, products)
    others = tuple(i for i in range(carry) if i not in own)
    stateful = sum(1 << i for i in others if program.results[i] != consts + i)
    dynamic = _dynamic(program, consts, carry)

    # The values that the rest takes from the first part.
    new = {a for i in own if isinstance(a := program.results[i], int) and a >= program.inputs and dynamic[a]}
    inputs = {consts + i for i in own}
    given: set[int] = set()
    wanted = _variables(program.results[i] for i in (*others, *range(carry, len(program.results))))
    for op in reversed(program.ops):
        used = wanted.intersection(op.outs)
        if not used:
            continue
        early = dynamic[op.outs[0]] and not reaches[op.outs[0]] & stateful
        taken = set() if not early else used & new if mappable(program, op) else used
        given |= taken
        if used - taken:
            wanted |= _variables(op.ins)
    given |= wanted & inputs
    if not own and not given:
        raise Refusal("nothing of it can run first")
    order = tuple(sorted(given))
    xs = tuple(range(consts + carry, program.inputs))
    constants = tuple(range(consts))
    first = restricted(
        program,
        (*constants, *(consts + i for i in own), *xs),
        (*(program.results[i] for i in own), *order),
    )
    rest = restricted(
        program,
        (*constants, *(consts + i for i in others), *order, *xs),
        (*(program.results[i] for i in others), *program.results[carry:]),
    )
    return Split(program, consts, carry, own, others, len(order), first, rest)


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


def _dynamic(program: Program, consts: int, carry: int) -> list[bool]:
    """Whether each variable can differ from step to step."""
    fixed = {consts + i for i in range(carry) if program.results[i] == consts + i}
    found = [consts <= a < program.inputs and a not in fixed for a in range(len(program.forms))]
    for op in program.ops:
        for out in op.outs:
            found[out] = any(found[a] for a in op.ins if isinstance(a, int))
    return found


def _dependences(program: Program, consts: int, carry: int) -> tuple[list[int], list[int]]:
    """The leaves of the carry that each variable depends on, and those that it depends on through a matmul, as bits.

    Leaves that no step changes are left out.
    """
    reaches, products = [0] * len(program.forms), [0] * len(program.forms)
    for i in range(carry):
        if program.results[i] != consts + i:
            reaches[consts + i] = 1 << i
    for op in program.ops:
        atoms = [a for a in op.ins if isinstance(a, int)]
        reached = functools.reduce(int.__or__, (reaches[a] for a in atoms), 0)
        multiplied = functools.reduce(int.__or__, (products[a] for a in atoms), 0)
        if contraction(program, op) is not None:
            multiplied |= reached
        for out in op.outs:
            reaches[out] = reached
            products[out] = multiplied
    return reaches, products


def _own(program: Program, consts: int, carry: int, reaches: list[int], products: list[int]) -> tuple[int, ...]:
    """The leaves that the first part computes.

    If leaves have a recurrent matmul, these are the state of the cell, with all leaves that depend on them. If there is
    no recurrent matmul, the state is all leaves that have the largest size and are floats or complex numbers.
    """
    results = program.results[:carry]
    changing = [i for i in range(carry) if results[i] != consts + i]
    closure = {i: (1 << i) | (reaches[a] if isinstance(a := results[i], int) else 0) for i in changing}
    for _ in changing:
        for i in changing:
            for j in changing:
                if closure[i] >> j & 1:
                    closure[i] |= closure[j]
    cell = 0
    for i in changing:
        through = products[a] if isinstance(a := results[i], int) else 0
        cell |= sum(1 << j for j in changing if through >> j & 1 and closure[j] >> i & 1)
    if not cell:
        forms = {i: program.forms[consts + i] for i in changing}
        size = {i: int(np.prod(form.shape)) for i, form in forms.items()}
        floats = [i for i, form in forms.items() if isinstance(form.dtype, np.dtype) and form.dtype.kind in "fc"]
        cell = sum(1 << i for i in floats if size[i] == max(size[j] for j in floats))
    return tuple(i for i in changing if cell and not closure[i] & cell)
