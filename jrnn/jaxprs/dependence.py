"""Finds whether each variable of a step depends only on constants, on the input of the step, or on the state."""

from __future__ import annotations

from collections.abc import Iterable

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Const, Program
from jrnn.jaxprs.recipes import INPUT, INVARIANT, STATE

__all__ = ["Dependence"]


class Dependence:
    """A step ``(consts, carry, x) -> (carry, y)``, and the kind of each of its variables.

    ``leaves`` are the leaves of the carry that change. ``fixed`` are the leaves that no step changes; they are treated
    as constants. ``made_by`` maps each variable that is not an input to the operation that computes it.
    """

    def __init__(self, program: Program, consts: int, carry: int) -> None:
        self.program, self.consts, self.carry = program, consts, carry
        self.fixed = tuple(i for i in range(carry) if program.results[i] == consts + i)
        self.leaves = tuple(i for i in range(carry) if i not in self.fixed)
        if not self.leaves:
            raise Refusal("no leaf of its carry changes")
        self.kinds = self._kinds()
        self.made_by = {out: op for op in program.ops for out in op.outs}

    def _kinds(self) -> list[int]:
        program = self.program
        kinds = [INVARIANT] * self.consts + [STATE] * self.carry
        kinds += [INPUT] * (program.inputs - len(kinds)) + [INVARIANT] * (len(program.forms) - program.inputs)
        for i in self.fixed:
            kinds[self.consts + i] = INVARIANT
        for op in program.ops:
            kind = max((kinds[a] for a in op.ins if isinstance(a, int)), default=INVARIANT)
            for out in op.outs:
                kinds[out] = kind
        return kinds

    def kind(self, atom: int | Const) -> int:
        return self.kinds[atom] if isinstance(atom, int) else INVARIANT

    def shape(self, atom: int | Const) -> tuple[int, ...]:
        return self.program.form(atom).shape

    def needed(self, atoms: Iterable[int | Const]) -> set[int]:
        """The ids of the operations that the atoms depend on."""
        wanted = {a for a in atoms if isinstance(a, int)}
        needed = set()
        for op in reversed(self.program.ops):
            if wanted.intersection(op.outs):
                wanted.update(a for a in op.ins if isinstance(a, int))
                needed.add(id(op))
        return needed

    def after(self) -> dict[int, tuple[int, bool]]:
        """The variables of the loop that the outputs are computed from.

        Each maps to the leaf of the carry that it is, and whether it is the leaf after the step (True) or before it.
        """
        results = self.program.results
        given: dict[int, tuple[int, bool]] = {self.consts + i: (i, False) for i in self.leaves}
        given |= {a: (i, True) for i in self.leaves if isinstance(a := results[i], int)}
        wanted = {a for a in results[self.carry :] if isinstance(a, int) and self.kinds[a] == STATE}
        for op in reversed(self.program.ops):
            if wanted.intersection(op.outs) - set(given):
                if not op.mappable:
                    raise Refusal(f"its output depends on {op.name!r} of its state")
                wanted.update(a for a in op.ins if isinstance(a, int) and self.kinds[a] == STATE)
        return {a: given[a] for a in sorted(wanted & set(given))}

    def check_inputs(self) -> None:
        """Raises if an operation on the input cannot run for all steps at once."""
        for op in self.program.ops:
            if self.kinds[op.outs[0]] == INPUT and not op.mappable:
                raise Refusal(f"it computes {op.name!r} of its input, which stays at its step")
