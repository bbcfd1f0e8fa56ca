"""Reads the parts of any step: the operations that leave the loop, and the products of the state that stay in it.

The step is a program ``(consts, carry, x) -> (carry, y)``. Its operations are

- *invariant* ones, which run once,
- those that depend on x and not on the state, which run for all steps at once before the loop,
- the *loop*: those that depend on the state and that the next carry needs, and
- those that depend on the state and that no carry needs, which run for all steps at once after the loop.

A product of ``[x, h]``, x and the state side by side, is read as the sum of one of x and one of the state.

A *site* is a product in the loop of a state-dependent array with invariant weights: a matmul, or a convolution with a
kernel. Operations that are not ``mappable`` (see `jrnn.jaxprs.primitives`) and depend on x or on the state stay in the
loop, except for convolutions with an invariant kernel, which run for all steps at once as one convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jrnn.jaxprs.blocks import Refusal
from jrnn.jaxprs.flat import Const, Op, Program, bind, contraction, flatten, reading
from jrnn.jaxprs.recipes import INPUT, INVARIANT, STATE

__all__ = ["Site", "Sites", "read"]


@dataclass(frozen=True)
class Site:
    """A product: the index of its operation in the loop, and the index of the weights among its operands."""

    place: int
    weights: int

    def operands(self, op: Op) -> tuple[Any, Any]:
        """The vector and the weights, as variables."""
        return op.ins[1 - self.weights], op.ins[self.weights]


@dataclass(frozen=True)
class Sites:
    """The parts of a step. All fields follow from the program, in which products of ``[x, h]`` are taken apart.

    ``before``, ``loop`` and ``after`` are operations, in order. ``invariant`` and ``inputs`` are the variables that the
    loop takes from outside: those that are the same at every step, and those with a value for each step. ``emitted``
    are the variables of the loop that the outputs need.
    """

    program: Program
    consts: int
    carry: int
    kinds: tuple[int, ...] = field(compare=False)
    before: tuple[Op, ...] = field(compare=False)
    loop: tuple[Op, ...] = field(compare=False)
    after: tuple[Op, ...] = field(compare=False)
    invariant: tuple[int, ...] = field(compare=False)
    inputs: tuple[int, ...] = field(compare=False)
    emitted: tuple[int, ...] = field(compare=False)
    sites: tuple[Site, ...] = field(compare=False)

    @property
    def outputs(self) -> tuple[int | Const, ...]:
        return self.program.results[self.carry :]

    @property
    def new_carry(self) -> tuple[int | Const, ...]:
        return self.program.results[: self.carry]

    def shared(self) -> frozenset[int]:
        """The invariant variables with a use in the loop other than as the weights of a site."""
        weights = {(site.place, site.operands(self.loop[site.place])[1]) for site in self.sites}
        used = {a for i, op in enumerate(self.loop) for a in op.ins if isinstance(a, int) and (i, a) not in weights}
        return frozenset(used | {a for a in self.new_carry if isinstance(a, int)})


def read(program: Program, consts: int, carry: int) -> Sites:
    """The parts of a step ``(consts, carry, x) -> (carry, y)``.

    Raises:
      Refusal: there is no site.
    """
    with reading():
        return _read(program, consts, carry)


def _read(program: Program, consts: int, carry: int) -> Sites:
    program = _apart(program, carry, _kinds(program, consts, carry))
    kinds = _kinds(program, consts, carry)

    def variables(atoms: Any) -> set[int]:
        return {a for a in atoms if isinstance(a, int)}

    # First the operations that the next carry needs, then the others that the outputs need.
    wanted = variables(program.results[:carry])
    outputs = variables(program.results[carry:])
    in_loop: set[int] = set()
    for op in reversed(program.ops):
        if kinds[op.outs[0]] == STATE and wanted.intersection(op.outs):
            in_loop.add(id(op))
            wanted |= variables(op.ins)
    for op in reversed(program.ops):
        if kinds[op.outs[0]] == STATE and id(op) not in in_loop and outputs.intersection(op.outs):
            outputs |= variables(op.ins)
            if not _mappable(op, kinds):  # stays in the loop, with all operations that it depends on
                in_loop |= _with_ancestors(program, kinds, op)
    loop = [op for op in program.ops if id(op) in in_loop]
    made = {out for op in loop for out in op.outs} | set(range(consts, consts + carry))
    after = [
        op for op in program.ops
        if kinds[op.outs[0]] == STATE and id(op) not in in_loop and outputs.intersection(op.outs)
    ]  # fmt: skip
    used = variables(a for op in loop for a in op.ins) | variables(program.results[:carry])
    seen = variables(a for op in after for a in op.ins) | variables(program.results[carry:])
    sites = []
    for place, op in enumerate(loop):
        if jnp.issubdtype(program.forms[op.outs[0]].dtype, jnp.floating):
            operands = _kinds_of(op, kinds)
            matmul = contraction(program, op) is not None and sorted(operands) == [INVARIANT, STATE]
            if matmul or (_convolves(op, kinds) and operands[0] == STATE):
                sites.append(Site(place, operands.index(INVARIANT)))
    if not sites:
        raise Refusal("it has no product of its state with weights")
    before = [op for op in program.ops if kinds[op.outs[0]] == INPUT]
    return Sites(
        program, consts, carry, tuple(kinds), tuple(before), tuple(loop), tuple(after),
        tuple(sorted(a for a in used if kinds[a] == INVARIANT)), tuple(sorted(a for a in used if kinds[a] == INPUT)),
        tuple(sorted(seen & made)), tuple(sites),
    )  # fmt: skip


def _kinds(program: Program, consts: int, carry: int) -> list[int]:
    """The kind of each variable."""
    kinds = [INVARIANT] * consts + [STATE] * carry
    kinds += [INPUT] * (program.inputs - len(kinds)) + [INVARIANT] * (len(program.forms) - program.inputs)
    for op in program.ops:
        kind = max((kinds[a] for a in op.ins if isinstance(a, int)), default=INVARIANT)
        kind = STATE if kind == INPUT and not _mappable(op, kinds) else kind
        for out in op.outs:
            kinds[out] = kind
    return kinds


def _apart(program: Program, carry: int, kinds: list[int]) -> Program:
    """The program with each product of a concatenation ``[x, h]`` as ``x W_x + h W_h``, so that x leaves the loop.

    Only of products that the next carry needs: the others leave the loop anyway.
    """
    made = {op.outs[0]: op for op in program.ops if op.name == "concatenate"}
    wanted = {a for a in program.results[:carry] if isinstance(a, int)}
    for op in reversed(program.ops):
        if wanted.intersection(op.outs):
            wanted.update(a for a in op.ins if isinstance(a, int))
    forms, ops = list(program.forms), []
    for op in program.ops:
        found = _joined(program, op, made, kinds) if op.outs[0] in wanted else None
        if found is None:
            ops.append(op)
            continue
        side, axes, joined = found
        states = [kinds[a] == STATE if isinstance(a, int) else False for a in joined.ins]
        parts = _parts_of_product(op, side, axes, states, [program.form(a) for a in (*joined.ins, op.ins[1 - side])])
        names: dict[int, Any] = dict(enumerate((*joined.ins, op.ins[1 - side])))
        for inner in parts.ops:
            for out in inner.outs:
                names[out] = op.outs[0] if out == parts.results[0] else len(forms)
                if out != parts.results[0]:
                    forms.append(parts.forms[out])
            ins = tuple(names[a] if isinstance(a, int) else a for a in inner.ins)
            ops.append(replace(inner, ins=ins, outs=tuple(names[out] for out in inner.outs)))
    return Program(program.inputs, tuple(ops), program.results, tuple(forms))


def _joined(program: Program, op: Op, made: dict[Any, Op], kinds: list[int]) -> tuple[int, tuple[int, int], Op] | None:
    """For a product over the axis along which state and other arrays are concatenated: which operand that is, the axis
    of each operand that is summed over, and the concatenation. None for anything else.
    """
    numbers, operands = contraction(program, op), _kinds_of(op, kinds)
    if numbers is None or sorted(operands) != [INVARIANT, STATE] or any(len(axes) != 1 for axes in numbers[0]):
        return None
    side, axes = operands.index(STATE), (numbers[0][0][0], numbers[0][1][0])
    joined = made.get(op.ins[side])
    if joined is None or joined.params["dimension"] != axes[side] or min(_kinds_of(joined, kinds)) == STATE:
        return None
    return side, axes, joined


def _parts_of_product(op: Op, side: int, axes: tuple[int, int], states: list[bool], forms: list[Any]) -> Program:
    """``(*pieces, weights) -> product``, as the sum of that of the pieces that are states and that of the others."""

    def split(*operands: Any) -> Any:
        *pieces, weights = operands
        ends = np.cumsum([piece.shape[axes[side]] for piece in pieces]).tolist()
        rows = [
            lax.slice_in_dim(weights, end - piece.shape[axes[side]], end, axis=axes[1 - side])
            for piece, end in zip(pieces, ends, strict=True)
        ]

        def product(state: bool) -> Any:
            chosen = [i for i, is_state in enumerate(states) if is_state == state]
            pair: list[Any] = [None, None]
            for place, arrays in ((side, pieces), (1 - side, rows)):
                mine = [arrays[i] for i in chosen]
                pair[place] = mine[0] if len(mine) == 1 else lax.concatenate(mine, axes[place])
            return bind(op.primitive, op.params, pair)[0]

        return lax.add(product(False), product(True))

    closed = jax.make_jaxpr(split)(*(jax.ShapeDtypeStruct(form.shape, form.dtype) for form in forms))
    return flatten(closed)[0]


def _kinds_of(op: Op, kinds: list[int]) -> list[int]:
    """The kinds of the operands."""
    return [kinds[a] if isinstance(a, int) else INVARIANT for a in op.ins]


def _convolves(op: Op, kinds: list[int]) -> bool:
    """Whether an operation is a convolution with an invariant kernel, which takes several steps as a larger batch."""
    plain = op.name == "conv_general_dilated" and op.params["batch_group_count"] == 1
    return plain and _kinds_of(op, kinds)[1] == INVARIANT


def _mappable(op: Op, kinds: list[int]) -> bool:
    return op.mappable or _convolves(op, kinds)


def _with_ancestors(program: Program, kinds: list[int], op: Op) -> set[int]:
    wanted, found = set(op.outs), set()
    for other in reversed(program.ops):
        if kinds[other.outs[0]] == STATE and wanted.intersection(other.outs):
            wanted.update(a for a in other.ins if isinstance(a, int))
            found.add(id(other))
    return found
