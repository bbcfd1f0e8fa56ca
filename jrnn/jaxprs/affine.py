"""Reads the affine form of a recurrent step: matmuls of x, one matmul of h, and elementwise gates.

The step is a program ``(consts, carry, x) -> (carry, y)``. Its variables are of three kinds: *invariant* ones, which
depend only on constants; those that depend on x and not on the state; and those that depend on the state. Variables of
the last kind that the new carry needs are evaluated symbolically, as blocks along the feature axis. For example::

    concatenate([h W_1, x V + b])   is   [ columns of h W_1 | columns of x V, plus b ]

Every way to write the same step ends in the same form: four matmuls or one matmul that is split, ``[x, h]``
concatenated before a matmul, features first or last, a bias on either side. The result is elementwise gates of

- columns of one product ``h W`` (``v``), alone or with a term ``u`` added that does not depend on the state,
- the leaves of the state, and vectors that are the same at every step.

A ``select`` by one flag for each sequence is read as a reset if it is the first operation on the state. As the last
operation it is read as a mask if it selects the old state, and as a reset before the next step if it selects constants.
A step that does anything else is refused, with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jrnn.jaxprs.blocks import (
    EVERY,
    Elementwise,
    Gate,
    Held,
    Piece,
    Refusal,
    Reset,
    State,
    Sum,
    Value,
    shared_ranges,
)
from jrnn.jaxprs.dependence import Dependence
from jrnn.jaxprs.flat import Const, Op, Program, contraction, reading
from jrnn.jaxprs.gates import Gates, Parts, assemble, is_not_zero, recipe
from jrnn.jaxprs.primitives import primitive
from jrnn.jaxprs.recipes import INPUT, INVARIANT, STATE, Add, Atom, Flat, Negative, Number, PerSequence, Recipe, Take

__all__ = ["Affine", "Mask", "Resets", "read"]


@dataclass(frozen=True)
class Resets:
    """Where ``flags`` (a recipe of ``(*B)``) equal ``on``, the carry is replaced by ``values``, a recipe each leaf."""

    flags: Recipe
    on: bool
    values: tuple[Recipe, ...]


@dataclass(frozen=True)
class Mask:
    """Where ``flags`` (a recipe of ``(*B)``) equal ``on``, the step is taken. Elsewhere the carry is held."""

    flags: Recipe
    on: bool


@dataclass(frozen=True)
class Affine:
    """The affine form of a step.

    ``leaves`` are the leaves of the carry that change, all ``(*batch, units)``. ``hidden`` is the leaf that the matmul
    takes. ``fixed`` are the leaves that no step changes. ``kinds`` has the kind of each variable: invariant, or
    dependent on the input or on the state. ``resets`` apply to the carry before the step. ``ends`` apply to the carry
    after it: the gates leave them to the next step. ``after`` are the variables of the loop that the outputs are
    computed from (see `Dependence.after`).

    Forms are compared by their program, from which all other fields follow.
    """

    program: Program
    consts: int
    carry: int
    leaves: tuple[int, ...] = field(compare=False)
    fixed: tuple[int, ...] = field(compare=False)
    hidden: int = field(compare=False)
    batch: tuple[int, ...] = field(compare=False)
    units: int = field(compare=False)
    dtype: Any = field(compare=False)
    kinds: tuple[int, ...] = field(compare=False)
    gates: Gates = field(compare=False)
    parts: Parts = field(compare=False)
    resets: Resets | None = field(compare=False)
    mask: Mask | None = field(compare=False)
    ends: Resets | None = field(compare=False)
    after: dict[int, tuple[int, bool]] = field(compare=False)

    @property
    def outputs(self) -> tuple[int | Const, ...]:
        return self.program.results[self.carry :]


def read(program: Program, consts: int, carry: int, coupled: bool = True) -> Affine:
    """The affine form of a step ``(consts, carry, x) -> (carry, y)``.

    Args:
      program: the step.
      consts, carry: the number of its inputs that are constants, and the number of leaves of the carry after these.
      coupled: whether the step must have a recurrent matmul. Otherwise it may have none, and then its gates include
        the elementwise operations on products of the input, which a loop without a recurrent matmul computes as fast
        as any other, without writing their results to memory.

    Raises:
      Refusal: the step has no affine form, with the reason.
    """
    try:
        with reading():
            return _Reader(program, consts, carry, coupled).read()
    except RecursionError:
        raise Refusal("its gates are a chain of more operations than can be followed") from None


class _Reader(Dependence):
    def __init__(self, program: Program, consts: int, carry: int, coupled: bool) -> None:
        super().__init__(program, consts, carry)
        self.coupled = coupled
        self.values: dict[int, Value] = {}
        self.resets: list[Reset] = []
        self.ended: dict[int, _Ended] = {}
        self.held: dict[int, int | Const] = {}  # the state before the mask, by the variable after it
        self.cuts: dict[Any, Any] = {}
        self._begin()

    def read(self) -> Affine:
        results = self.program.results
        needed = self.needed(results[i] for i in self.leaves)
        for op in self.program.ops:
            kind = max(map(self.kind, op.ins), default=INVARIANT)
            if kind == STATE and id(op) in needed:
                self._follow(op)
            elif kind == INPUT:
                self._try(op)
        last = [results[i] for i in self.leaves]
        new = [self._new_leaf(atom, i) for atom, i in zip(last, self.leaves, strict=True)]
        new, mask = self._unheld(new)
        ends = self._ends(last)
        if ends is not None:
            last = [self.ended[atom].new for atom in last]  # type: ignore[index]
            new = [self._new_leaf(atom, i) for atom, i in zip(last, self.leaves, strict=True)]
        resets = self._resets(new)
        gates, parts, hidden = assemble(new, self.leaves, self.units, self.dtype, self.kinds, self.coupled)
        self.check_inputs()
        after = self.after(last, *self._shown(mask, last))
        return Affine(
            self.program, self.consts, self.carry, self.leaves, self.fixed, hidden, self.batch, self.units, self.dtype,
            tuple(self.kinds), gates, parts, resets, mask, ends, after,
        )  # fmt: skip

    # --- variables ---

    def _begin(self) -> None:
        """Begins with the leaves of the carry, which must all be ``(*B, H)``, of one float dtype."""
        forms = [self.program.forms[self.consts + i] for i in self.leaves]
        if len({form[:2] for form in forms}) != 1:
            shown = sorted({f"{form.dtype}{list(form.shape)}" for form in forms})
            raise Refusal(f"the leaves of its carry that change are not of one shape and dtype: {', '.join(shown)}")
        shape, dtype = forms[0].shape, forms[0].dtype
        if not shape or not all(shape):
            raise Refusal(f"its carry has the shape {shape}, where batch axes and units are read")
        if not isinstance(dtype, np.dtype) or dtype.kind != "f" or dtype.itemsize < 4:
            raise Refusal(f"its carry is {dtype}, where float32 or float64 is read")
        self.batch, self.units, self.dtype = shape[:-1], shape[-1], dtype
        self.batch_axes = tuple(("b", i) for i in range(len(self.batch)))
        for i in self.leaves:
            self.values[self.consts + i] = Value((State(i, self.units),), (*self.batch_axes, "f"))

    def _new_leaf(self, atom: int | Const, i: int) -> Any:
        if self.program.form(atom)[:2] != self.program.forms[self.consts + i][:2]:
            raise Refusal("a leaf of its new carry is of another shape or dtype")
        axes = (*self.batch_axes, "f")
        value = self.values.get(atom) if isinstance(atom, int) else None
        if value is None:
            value = self._known(atom, axes, (*self.batch, self.units))
        if value.axes != axes:
            raise Refusal("a leaf of its new carry has its axes in another order")
        if len(value.blocks) > 1:
            raise Refusal("a leaf of its new carry is put together from parts of its units")
        return value.blocks[0]

    # --- masks and resets ---

    def _unheld(self, new: list[Any]) -> tuple[list[Any], Mask | None]:
        """The new leaves without the mask that holds all of them, and the mask."""
        if not any(isinstance(e, Held) for e in new):
            return new, None
        first = next(e for e in new if isinstance(e, Held))
        for i, e in zip(self.leaves, new, strict=True):
            if not isinstance(e, Held) or (e.flags, e.on) != (first.flags, first.on):
                raise Refusal("flags hold a part of its carry and not another part")
            if not isinstance(e.old, State) or e.old.leaf != i:
                raise Refusal("flags hold what is not a leaf of its carry as the step meets it")
            if isinstance(e.new, Held):
                raise Refusal("a part of its carry is held twice")
        return [e.new for e in new], Mask(first.flags, first.on)

    def _resets(self, new: list[Any]) -> Resets | None:
        """The reset that all leaves share. Refuses if a leaf is also used without the reset."""
        if not self.resets:
            return None
        raw: list[State] = []
        seen: set[int] = set()

        def visit(e: Any) -> None:
            if isinstance(e, State):
                raw.append(e)
            elif isinstance(e, Sum):
                raw.extend(p.vector for p in e.pieces if isinstance(p.vector, State))
            elif isinstance(e, Gate) and id(e) not in seen:
                seen.add(id(e))
                for arg in e.args:
                    visit(arg)

        for e in new:
            visit(e)
        values = {r.leaf: r.value for r in self.resets}
        first = self.resets[0]
        same = all((r.flags, r.on, r.value) == (first.flags, first.on, values[r.leaf]) for r in self.resets)
        if raw or not same or set(values) != set(self.leaves):
            raise Refusal("flags replace a part of its carry and not another part, or with other values")
        return Resets(first.flags, first.on, tuple(values[i] for i in self.leaves))

    def _ends(self, last: Sequence[int | Const]) -> Resets | None:
        """The reset after the step that all leaves share, unless there is one before the step too."""
        ends = [self.ended.get(atom) if isinstance(atom, int) else None for atom in last]
        first = ends[0]
        if first is None or self.resets:
            return None
        if any(end is None or (end.flags, end.on) != (first.flags, first.on) for end in ends):
            return None
        return Resets(first.flags, first.on, tuple(end.value for end in ends if end is not None))

    def _shown(self, mask: Mask | None, last: Sequence[int | Const]) -> tuple[dict[int, int], dict[int, int]]:
        """The leaves before the mask, and all selections by its flags: see `Dependence.after`."""
        if mask is None:
            return {}, {}
        pairs = [(self.held.get(atom), i) for atom, i in zip(last, self.leaves, strict=True)]  # type: ignore[arg-type]
        masked = {new: i for new, i in pairs if isinstance(new, int) and self.kinds[new] == STATE}
        shown = {}
        for op in self.program.ops:
            shape = self.shape(op.outs[0])
            if op.name != "select_n" or len(op.ins) != 3 or self.kind(op.ins[0]) == STATE or shape[:-1] != self.batch:
                continue
            try:
                found = self._recipe(op.ins[0], (*self.batch_axes, "f"), shape)
            except Refusal:
                continue
            if (found.source if isinstance(found, PerSequence) else found) == mask.flags:
                shown[id(op)] = 1 + mask.on
        return masked, shown

    # --- arrays that need no state ---

    def _known(self, atom: int | Const, axes: Any, outer: tuple[int, ...]) -> Value:
        """An array that does not depend on the state, as one block. It broadcasts to ``outer``, with the named axes."""
        if self.kind(atom) == STATE:
            raise Refusal("it uses a result of an operation that was not followed")
        dtype = self.program.form(atom).dtype
        flags = isinstance(atom, int) and dtype == np.dtype(bool)
        # Literals become constants of the gates.
        if isinstance(atom, int) and dtype != self.dtype and not flags:
            raise Refusal(f"its gates are given an array of {dtype}, where its state is {self.dtype}")
        found = self._recipe(atom, axes, outer)
        width = EVERY
        if found.shape:
            width = int(np.prod([n for n, axis in zip(outer, axes, strict=True) if axis in ("f", "g")]))
        if flags:  # The inputs of gates are numbers, so the gates compare them with 0.
            number = Sum((), Number(found, self.dtype), width)
            return Value((is_not_zero(number, self.dtype),), axes)
        return Value((Sum((), found, width),), axes)

    def _recipe(self, atom: int | Const, axes: Any, outer: tuple[int, ...]) -> Recipe:
        """The recipe ``(*B, F)``, ``(F)`` or ``()`` for an array that broadcasts to ``outer``."""
        shape = self.shape(atom)
        if not shape:
            return Atom.of(self.program, atom)
        names: list[Any] = ["1" if n == 1 and o != 1 else a for n, o, a in zip(shape, outer, axes, strict=True)]
        # Goes back through operations that only add axes, so that a bias stays a vector.
        while isinstance(atom, int) and atom in self.made_by:
            op = self.made_by[atom]
            inner = self.shape(op.ins[0]) if op.ins else ()
            if op.name == "broadcast_in_dim" and len(op.ins) == 1:
                dims = op.params["broadcast_dimensions"]
                names = ["1" if n == 1 and shape[d] != 1 else names[d] for n, d in zip(inner, dims, strict=True)]
            elif op.name in ("reshape", "expand_dims") and (places := _places(inner, shape)) is not None:
                names = [names[i] for i in places]
            else:
                break
            atom, shape = op.ins[0], inner
        order = [n for n in (*self.batch_axes, "g", "f") if n in names]
        batch = tuple(n for n in order if isinstance(n, tuple))
        if batch and batch != self.batch_axes:
            raise Refusal("it uses an array that has some of the batch axes and not others")
        if "g" in axes and ("g" in order) != ("f" in order):
            raise Refusal("it broadcasts an array over groups of features, or over the features of a group")
        ordered = _take(self._source(atom), names, order)
        if batch and "f" not in order:
            return PerSequence(ordered)
        return Flat(ordered) if "g" in order else ordered

    def _source(self, atom: int | Const) -> Recipe:
        """The recipe for a variable: if it is a range of the last axis of another one, as such."""
        op = self.made_by.get(atom) if isinstance(atom, int) else None
        if op is None or op.name not in ("slice", "split"):
            return Atom.of(self.program, atom)
        shape = self.shape(op.ins[0])
        if op.name == "split":
            ends = list(itertools.accumulate(map(int, op.params["sizes"])))
            at = op.outs.index(atom)
            last, start, stop = op.params["axis"] == len(shape) - 1, ends[at] - self.shape(atom)[-1], ends[at]
        else:
            starts, stops, strides = (op.params[name] for name in ("start_indices", "limit_indices", "strides"))
            last = not any(starts[:-1]) and tuple(stops[:-1]) == shape[:-1] and all(n == 1 for n in strides or ())
            start, stop = starts[-1], stops[-1]
        return self._source(op.ins[0]).columns(start, stop) if last else Atom.of(self.program, atom)

    # --- following operations ---

    def _try(self, op: Op) -> None:
        """Follows an operation that does not depend on the state, if possible. Its result is available in any case."""
        if self.coupled and primitive(op.name).elementwise and op.name not in _LINEAR:
            return
        try:
            self._follow(op)
        except Refusal:
            for out in op.outs:
                self.values.pop(out, None)

    def _follow(self, op: Op) -> None:
        out, row = op.outs[0], primitive(op.name)
        same = op.name == "convert_element_type" and self.program.form(op.ins[0])[1] == self.program.forms[out][1]
        if same or op.name in ("copy", "copy_p"):  # but not stop_gradient, whose derivative differs
            self.values[out] = self._value(op.ins[0])
        elif (numbers := contraction(self.program, op)) is not None:
            self.values[out] = self._product(op, *numbers)
        elif row.rearranges:
            self.values.update(zip(op.outs, getattr(self, f"_{op.name}")(op), strict=True))
        elif op.name == "select_n" and (flagged := self._flagged(op)) is not None:
            self.values[out] = flagged
        elif row.elementwise or op.derivative is not None:
            self._elementwise(op)
        else:
            raise Refusal(f"its next state depends on {op.name!r} of its state")

    def _value(self, atom: int | Const) -> Value:
        if isinstance(atom, int) and atom in self.values:
            return self.values[atom]
        raise Refusal("it rearranges an array whose axes are not known")

    def _operand(self, atom: int | Const, axes: Any, outer: tuple[int, ...]) -> Value:
        """The symbolic value of an operand of an operation whose result has these axes."""
        if isinstance(atom, int) and atom in self.values:
            value = self.values[atom]
            if value.axes == axes and self.shape(atom) == outer:
                return value
            if self.kinds[atom] == STATE:
                raise Refusal("it combines arrays whose axes are in different orders, or broadcasts its state")
        return self._known(atom, axes, outer)

    def _elementwise(self, op: Op) -> None:
        shape = self.shape(op.outs[0])
        followed = [a for a in op.ins if isinstance(a, int) and a in self.values and self.shape(a) == shape]
        if not followed:
            raise Refusal(f"{op.name!r} broadcasts its state")
        # The order of the axes is that of an operand that depends on the state, if there is one.
        axes = self.values[max(followed, key=self.kind)].axes
        operands = [self._operand(a, axes, shape) for a in op.ins]
        if any(self.program.forms[out].dtype not in (self.dtype, np.dtype(bool)) for out in op.outs):
            raise Refusal(f"{op.name!r} makes {self.program.forms[op.outs[0]].dtype} of its state")
        made = Elementwise(op, tuple(self.program.forms[out].dtype for out in op.outs))
        results: list[list[Any]] = [[] for _ in op.outs]
        for start, stop in shared_ranges(operands):
            args = tuple(self._part(value, start, stop) for value in operands)
            for which, blocks in enumerate(results):
                # Without a recurrent matmul a number is added in the gates: a sum of its own would be one more gate.
                apart = not self.coupled and any(arg.width == EVERY for arg in args)
                total = None if apart else _linear(op, args, stop - start)
                if total is None and self.kinds[op.outs[0]] == INPUT and self.coupled:
                    raise Refusal("it computes what needs no state, which is taken as it is")
                blocks.append(total or Gate(made, args, which, stop - start))
        if any(isinstance(e, Held) for value in operands for e in value.blocks):
            raise Refusal("it computes with a state that a flag has held")
        for out, blocks in zip(op.outs, results, strict=True):
            self.values[out] = Value(tuple(blocks), axes)

    def _part(self, value: Value, start: int, stop: int) -> Any:
        """A range that lies within one block, as a block."""
        if value.blocks[0].width == EVERY:
            return value.blocks[0]
        ((block, low, high),) = value.ranges(start, stop)
        return self._cut(block, low, high)

    def _cut(self, e: Any, start: int, stop: int) -> Any:
        """A range of the columns of an expression."""
        if e.width == EVERY or (start, stop) == (0, e.width):
            return e
        if isinstance(e, Sum):
            pieces = tuple(p._replace(start=p.start + start, stop=p.start + stop) for p in e.pieces)
            return Sum(pieces, None if e.known is None else _columns(e.known, start, stop), stop - start)
        if isinstance(e, Gate):
            key = (id(e), start, stop)  # each range is cut only once, since expressions share parts
            if key not in self.cuts:
                args = tuple(self._cut(arg, start, stop) for arg in e.args)
                self.cuts[key] = Gate(e.op, args, e.which, stop - start), e
            return self.cuts[key][0]
        raise Refusal("it takes a part of the units of its state")

    def _flagged(self, op: Op) -> Value | None:
        """A select by one flag for each sequence, as a reset or a mask; None if it is an operation of the gates."""
        flags, *cases = op.ins
        followed = [a for a in cases if isinstance(a, int) and a in self.values and self.kinds[a] == STATE]
        if self.kind(flags) == STATE or len(cases) != 2 or not followed:
            return None
        if self.program.form(flags).dtype != np.dtype(bool):
            return None
        axes, shape = self.values[followed[0]].axes, self.shape(followed[0])
        found = self._recipe(flags, axes, shape)
        if isinstance(found, PerSequence):
            found = found.source
        elif found.shape:
            return None
        values = [self._operand(a, axes, shape) for a in cases]
        if any(len(value.blocks) != 1 for value in values):
            return None
        (off,), (on,) = values[0].blocks, values[1].blocks
        for old, new, is_on in ((off, on, True), (on, off, False)):
            if isinstance(old, State) and isinstance(new, Sum) and not new.pieces:
                if new.known is None or new.known.kind(self.kinds) != INVARIANT:
                    raise Refusal("flags replace its state by something that differs from step to step")
                self.resets.append(Reset(old.leaf, old.width, found, is_on, new.known))
                return Value((self.resets[-1],), axes)
        for old, new, is_on in ((off, on, True), (on, off, False)):
            if isinstance(old, State | Reset):
                self.held[op.outs[0]] = cases[is_on]
                return Value((Held(found, is_on, new, old, old.width),), axes)
        for value, is_on in ((off, False), (on, True)):
            known = value.known if isinstance(value, Sum) and not value.pieces else None
            if known is not None and known.kind(self.kinds) == INVARIANT:
                self.ended[op.outs[0]] = _Ended(found, is_on, known, cases[not is_on])
        return None

    # --- rearranging ---

    def _range(self, value: Value, shape: tuple[int, ...], axis: int, start: int, stop: int) -> Value:
        name = value.axes[axis]
        if name == "f" and "g" in value.axes:
            raise Refusal("it takes a part of each group of features")
        if name not in ("f", "g"):
            raise Refusal("it takes a part of the batch")
        if name == "g":
            width = sum(block.width for block in value.blocks) // shape[axis]
            start, stop = start * width, stop * width
        return Value(tuple(self._cut(*part) for part in value.ranges(start, stop)), value.axes)

    def _split(self, op: Op) -> list[Value]:
        value, shape, axis, at = self._value(op.ins[0]), self.shape(op.ins[0]), op.params["axis"], 0
        found = []
        for size in map(int, op.params["sizes"]):
            found.append(self._range(value, shape, axis, at, at + size))
            at += size
        return found

    def _unstack(self, op: Op) -> list[Value]:
        value, shape = self._value(op.ins[0]), self.shape(op.ins[0])
        axis = op.params["axis"] % len(shape)
        if value.axes[axis] not in ("1", "g"):
            raise Refusal("it takes the batch or the features apart")
        rest = (*value.axes[:axis], *value.axes[axis + 1 :])
        if value.axes[axis] == "1":
            return [Value(value.blocks, rest)]
        return [Value(self._range(value, shape, axis, i, i + 1).blocks, rest) for i in range(shape[axis])]

    def _slice(self, op: Op) -> list[Value]:
        value, shape = self._value(op.ins[0]), self.shape(op.ins[0])
        starts, stops, strides = (op.params[name] for name in ("start_indices", "limit_indices", "strides"))
        if strides is not None and any(stride != 1 for stride in strides):
            raise Refusal("it takes a slice with strides")
        for axis, (start, stop, size) in enumerate(zip(starts, stops, shape, strict=True)):
            if (start, stop) != (0, size):
                value = self._range(value, shape, axis, start, stop)
        return [value]

    def _concatenate(self, op: Op) -> list[Value]:
        axis = op.params["dimension"]
        followed = [a for a in op.ins if isinstance(a, int) and a in self.values]
        if not followed:
            raise Refusal("it puts arrays together whose axes are not known")
        axes = self.values[max(followed, key=self.kind)].axes
        if axes[axis] not in ("f", "g") or (axes[axis] == "f" and "g" in axes):
            raise Refusal("it puts arrays together along another axis than that of features")
        values = [self._operand(a, axes, self.shape(a)) for a in op.ins]
        if any(block.width == EVERY for value in values for block in value.blocks):
            raise Refusal("it puts an array together with a number that is broadcast")
        return [Value(tuple(block for value in values for block in value.blocks), axes)]

    def _transpose(self, op: Op) -> list[Value]:
        value = self._value(op.ins[0])
        return [Value(value.blocks, tuple(value.axes[i] for i in op.params["permutation"]))]

    def _reshape(self, op: Op) -> list[Value]:
        """Adds or drops axes of size one, splits features into groups, or merges groups into features."""
        value = self._value(op.ins[0])
        mixed = Refusal("it reshapes an array so that axes of batch and features mix")
        if op.params.get("dimensions") is not None:
            raise mixed
        rest = [(n, a) for n, a in zip(self.shape(op.ins[0]), value.axes, strict=True) if a != "1"]
        axes: list[Any] = []
        for size in self.shape(op.outs[0]):
            if rest and rest[0][0] == size:
                axes.append(rest.pop(0)[1])
            elif size == 1:
                axes.append("1")
            elif rest and rest[0][1] == "f" and "g" not in value.axes and rest[0][0] % size == 0:
                axes.append("g")
                rest[0] = (rest[0][0] // size, "f")
            elif [a for _, a in rest[:2]] == ["g", "f"] and rest[0][0] * rest[1][0] == size:
                axes.append("f")
                del rest[:2]
            else:
                raise mixed
        if rest or axes.count("f") != 1:
            raise mixed
        return [Value(value.blocks, tuple(axes))]

    def _squeeze(self, op: Op) -> list[Value]:
        value, ndim = self._value(op.ins[0]), len(self.shape(op.ins[0]))
        dropped = {d % ndim for d in op.params["dimensions"]}
        if any(value.axes[d] not in ("1", "g") for d in dropped):
            raise Refusal("it drops an axis of the batch or of features")
        return [Value(value.blocks, tuple(a for i, a in enumerate(value.axes) if i not in dropped))]

    def _expand_dims(self, op: Op) -> list[Value]:
        value, ndim = self._value(op.ins[0]), len(self.shape(op.outs[0]))
        added, rest = {d % ndim for d in op.params["dimensions"]}, iter(value.axes)
        return [Value(value.blocks, tuple("1" if i in added else next(rest) for i in range(ndim)))]

    def _broadcast_in_dim(self, op: Op) -> list[Value]:
        value, inner = self._value(op.ins[0]), self.shape(op.ins[0])
        shape, dims = op.params["shape"], op.params["broadcast_dimensions"]
        names = dict(zip(dims, value.axes, strict=True))
        if any(n != (inner[dims.index(d)] if d in names else 1) for d, n in enumerate(shape)):
            raise Refusal("it broadcasts an array that depends on its state")
        return [Value(value.blocks, tuple(names.get(d, "1") for d in range(len(shape))))]

    # --- products ---

    def _product(self, op: Op, contracted: Any, batched: Any) -> Value:
        if any(batched) or any(len(axes) != 1 for axes in contracted):
            raise Refusal("it has a product of its state with batch axes, or over several axes")
        if not default_precision(op.params.get("precision")):
            raise Refusal("it has a product that asks for a precision")
        if any(self.program.form(a).dtype != self.dtype for a in (*op.ins, *op.outs)):
            raise Refusal(f"it has a product in another dtype than that of its state, {self.dtype}")
        kinds = [self.kind(a) for a in op.ins]
        if min(kinds) != INVARIANT:
            raise Refusal("it has a product of two arrays that both change from step to step")
        side = kinds.index(max(kinds))  # the operand that is the vector; the other is the weights
        (v_axis,), (w_axis,) = contracted[side], contracted[1 - side]
        value = self._vector(op.ins[side], v_axis)
        w_shape = self.shape(op.ins[1 - side])
        if value.axes[v_axis] != "f" or "g" in value.axes or not 2 <= len(w_shape) <= 3:
            raise Refusal("it has a product of its state over another axis than that of features")
        free = [i for i in range(len(w_shape)) if i != w_axis]
        weights = _take(Atom.of(self.program, op.ins[1 - side]), list(range(len(w_shape))), [w_axis, *free])
        weights = Flat(weights) if len(free) == 2 else weights
        depth, width = weights.shape
        pieces, row = [], 0
        for block in value.blocks:
            size = depth if len(value.blocks) == 1 else block.width
            rows = weights if size == depth else Take(weights, ((row, row + size), (0, width)), (0, 1))
            vector = _factor(block)
            if isinstance(vector, Recipe) and vector.shape != (*self.batch, size):
                raise Refusal("it has a product of an array that is broadcast")
            pieces.append(Piece(vector, rows, 0, width))
            row += size
        own = [a for i, a in enumerate(value.axes) if i != v_axis]
        made = ["f"] if len(free) == 1 else ["g", "f"]
        axes = [*own, *made] if side == 0 else [*made, *own]
        return Value((Sum(tuple(pieces), None, width),), tuple(axes))

    def _vector(self, atom: Any, axis: int) -> Value:
        """The vector of a matmul. A state-independent one is not followed, since it is computed before the loop."""
        if self.kinds[atom] == STATE:
            return self._value(atom)
        shape = self.shape(atom)
        if (*shape[:axis], *shape[axis + 1 :]) != self.batch:
            raise Refusal("it has a product of an array without the batch axes of its state")
        rest = iter(self.batch_axes)
        names = ["f" if i == axis else next(rest) for i in range(len(shape))]
        found = _take(Atom.of(self.program, atom), names, [*self.batch_axes, "f"])
        return Value((Sum((), found, shape[axis]),), tuple(names))


class _Ended(NamedTuple):
    """``value`` where ``flags`` equal ``on``, and the variable ``new`` elsewhere."""

    flags: Recipe
    on: bool
    value: Recipe
    new: int | Const


TERMS = 32  # the largest number of terms in one sum
_LINEAR = ("add", "add_any", "sub")


def _linear(op: Op, args: tuple[Any, ...], width: int) -> Sum | None:
    """A sum of sums, or a difference whose second term has no product, as one sum.

    None if it would have more than `TERMS` terms: a sum that is added to itself repeatedly grows without bound.
    """
    if op.name not in _LINEAR or not all(isinstance(arg, Sum) for arg in args):
        return None
    if sum(map(_terms, args)) > TERMS:
        return None
    a, b = args
    if op.name == "sub":
        if b.pieces:
            return None
        b = b._replace(known=Negative(b.known))
    known = a.known if b.known is None else b.known if a.known is None else Add(a.known, b.known)
    return Sum((*a.pieces, *b.pieces), known, width)


def _terms(e: Sum) -> int:
    return len(e.pieces) + (0 if e.known is None else e.known.terms)


def _columns(known: Recipe, start: int, stop: int) -> Recipe:
    """A range of the features of a recipe. Its last axis may have size one, to be broadcast."""
    return known if known.shape[-1:] == (1,) else known.columns(start, stop)


def _factor(e: Any) -> State | Reset | Recipe:
    """The vector of a matmul with weights: a leaf of the carry, or a recipe."""
    if isinstance(e, State | Reset):
        return e
    if isinstance(e, Sum) and not any(piece.recurrent for piece in e.pieces):
        return recipe(e)
    raise Refusal("it has a product of something computed from its state, and not of its state itself")


def _take(source: Recipe, names: list[Any], order: list[Any]) -> Recipe:
    """The named axes of an array in the given order. Axes that are left out must have size one."""
    shape = source.shape
    if any(name not in order and size != 1 for name, size in zip(names, shape, strict=True)):
        raise Refusal("it broadcasts an array along an axis that has a size already")
    if names == order:
        return source
    kept = [name for name in names if name in order]
    ranges = tuple((0, size) if name in order else None for name, size in zip(names, shape, strict=True))
    return Take(source, ranges, tuple(kept.index(name) for name in order))


def _places(inner: tuple[int, ...], outer: tuple[int, ...]) -> list[int] | None:
    """The index in ``outer`` of each axis of ``inner``, if both differ only in axes of size one; else None."""
    places, at = [], 0
    for size in inner:
        while at < len(outer) and outer[at] == 1 and size != 1:
            at += 1
        if at == len(outer) or outer[at] != size:
            return None
        places.append(at)
        at += 1
    return places if all(size == 1 for size in outer[at:]) else None


def default_precision(precision: Any) -> bool:
    """Whether a matmul has JAX's default precision."""
    each = precision if isinstance(precision, tuple) else (precision,)
    return all(p is None or p == jax.lax.Precision.DEFAULT for p in each)
