"""Finds whether each variable of a step depends only on constants, on the input of the step, or on the state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Const, Op, Program, contraction, mappable
from jrnn.jaxprs.recipes import INPUT, INVARIANT, STATE

__all__ = ["Dependence"]

# Elementwise operations whose values and derivatives are finite for all numbers of a usual size.
FINITE: tuple[str, ...] = (
    "add",
    "add_any",
    "cos",
    "erf",
    "exp",
    "logistic",
    "max",
    "min",
    "mul",
    "neg",
    "select_n",
    "sin",
    "square",
)
FINITE += ("stop_gradient", "sub", "tanh")


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

    def after(
        self,
        new: Sequence[int | Const],
        masked: Mapping[int, int] | None = None,
        shown: Mapping[int, int] | None = None,
    ) -> dict[int, tuple[int, bool]]:
        """The variables of the loop that the outputs are computed from.

        Each maps to the leaf of the carry that it is, and whether it is the leaf after the step (True) or before it.

        Args:
          new: the leaves after the step.
          masked: variables that equal a leaf after the step in all sequences that a mask does not hold. They count as
            this leaf if no output depends on them in the other sequences.
          shown: the selections by the flags of that mask: by the id of the operation, the index of the operand that
            is selected in the sequences that the mask does not hold.
        """
        outputs = self.program.results[self.carry :]
        given: dict[int, tuple[int, bool]] = {self.consts + i: (i, False) for i in self.leaves}
        given |= {a: (i, True) for i, a in zip(self.leaves, new, strict=True) if isinstance(a, int)}
        masked, shown = masked or {}, shown or {}
        wanted = {a for a in outputs if isinstance(a, int) and self.kinds[a] == STATE}
        everywhere = set(wanted)  # variables that the outputs need in all sequences
        for op in reversed(self.program.ops):
            if not wanted.intersection(op.outs) - set(given) - set(masked):
                continue
            if not mappable(self.program, op):
                raise Refusal(f"its output depends on {op.name!r} of its state")
            names = {a for a in op.ins if isinstance(a, int) and self.kinds[a] == STATE}
            wanted |= names
            if id(op) in shown:
                names = {a for i, a in enumerate(op.ins) if a in names and i != shown[id(op)]}  # type: ignore[misc]
                everywhere |= names
            elif everywhere.intersection(op.outs) or not self._by_sequence(op):
                everywhere |= names
        if everywhere & set(masked):
            return self.after(new, {a: i for a, i in masked.items() if a not in everywhere}, shown)
        given |= {a: (i, True) for a, i in masked.items()}
        return {a: given[a] for a in sorted(wanted & set(given))}

    def _by_sequence(self, op: Op) -> bool:
        """Whether an operation on arrays ``(*B, features)`` acts on each sequence by itself, and is always finite.

        It may then have any finite operands in sequences whose result is not selected: neither the result nor its
        gradient can become NaN there.
        """
        if op.name in FINITE or (op.name == "div" and self.kind(op.ins[1]) != STATE):
            return True
        numbers = contraction(self.program, op)
        if numbers is None or self.kind(op.ins[1]) != INVARIANT:
            return False
        contracted, batched = numbers
        return tuple(contracted[0]) == (len(self.shape(op.ins[0])) - 1,) and not any(batched)

    def check_inputs(self) -> None:
        """Raises if an operation on the input cannot run for all steps at once."""
        for op in self.program.ops:
            if self.kinds[op.outs[0]] == INPUT and not mappable(self.program, op):
                raise Refusal(f"it computes {op.name!r} of its input, which stays at its step")
