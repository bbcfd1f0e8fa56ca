"""Reads the affine form of a recurrent step: products of x, one product of h, and elementwise gates.

The step is a program ``(consts, carry, x) -> (carry, y)``. Its variables are of three kinds: *invariant* ones, which
depend on constants alone; those that depend on x and on no state; and those that depend on the state. A variable of
the last kind that the new carry needs is followed symbolically, as blocks along its feature axis::

    concatenate([h W_1, x V + b])   is   [ W_1-columns of h  |  V-columns of x, plus b ]

so that every way to write the same step ends in the same form: four products or one product that is split, ``[x, h]``
concatenated before a product, features first or last, biases added to either side. What is left are elementwise gates of

- the columns of one product ``h W`` (``v``), each alone or with something that needs no state added to it (``u``),
- the fields of the state, and vectors that are the same at each step.

A ``select`` by a flag of each sequence is read as a reset where it is the first thing that happens to the state, and as
a mask where it is the last. Whatever else a step does, it is refused, with the reason.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.jaxprs.flat import Const, Op, Program, Shaped, apply_elementwise, evaluate
from jrnn.jaxprs.primitives import ELEMENTWISE, UNMAPPABLE

__all__ = ["Affine", "Gates", "Refusal", "read"]


class Refusal(Exception):
    """Why a step has no affine form."""


INVARIANT, INPUT, STATE = range(3)

# --- recipes: values that need no state --------------------------------------------------------------------------
#
# A recipe is a tuple that says how to make an array outside the loop:
#   ("atom", n)                      variable n of the program
#   ("const", Const)                 a literal
#   ("take", recipe, ranges, order)  ranges of each axis, then axes in a new order; a range of None drops its axis
#   ("add", recipe, recipe)          with axes of size one, or missing in front, broadcast
#   ("neg", recipe)
#   ("flat", recipe, n)              the last n axes as one
#   ("per sequence", recipe)         (*B), with an axis of size one for features
#   ("dot", x, w)                    x (..., K) by w (K, N)


def make(recipe: Any, env: dict[int, Any]) -> Any:
    """The array that a recipe describes."""
    kind = recipe[0]
    if kind == "atom":
        return env[recipe[1]]
    if kind == "const":
        return recipe[1].value
    if kind == "add":
        a, b = make(recipe[1], env), make(recipe[2], env)
        shape = np.broadcast_shapes(np.shape(a), np.shape(b))
        return jax.lax.add(_spread(a, shape), _spread(b, shape))
    if kind == "neg":
        return jax.lax.neg(make(recipe[1], env))
    if kind == "per sequence":
        return make(recipe[1], env)[..., None]
    if kind == "flat":
        a = make(recipe[1], env)
        return a.reshape(*a.shape[: a.ndim - recipe[2]], -1)
    if kind == "dot":
        return jnp.matmul(make(recipe[1], env), make(recipe[2], env))
    _, source, ranges, order = recipe
    a = make(source, env)
    starts = [0 if r is None else r[0] for r in ranges]
    stops = [1 if r is None else r[1] for r in ranges]
    if list(zip(starts, stops, strict=True)) != [(0, n) for n in a.shape]:
        a = jax.lax.slice(a, starts, stops)
    a = jax.lax.squeeze(a, [i for i, r in enumerate(ranges) if r is None])
    return a if order == tuple(range(a.ndim)) else jnp.transpose(a, order)


def _spread(a: Any, shape: tuple[int, ...]) -> Any:
    own = np.shape(a)
    if own == shape:
        return a
    return jax.lax.broadcast_in_dim(a, shape, tuple(range(len(shape) - len(own), len(shape))))


# --- symbolic values ---------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Columns ``start`` to ``stop`` of the product of a vector with weights ``(K, N)``, which are a recipe.

    The vector is ``("state", field)`` or a recipe of ``(*B, K)``.
    """

    vector: Any
    weights: Any
    start: int
    stop: int


class Sum(NamedTuple):
    """Pieces of products and a recipe (or None) that are added up: ``(*B, width)``."""

    pieces: tuple[Piece, ...]
    known: Any
    width: int


class State(NamedTuple):
    """A field of the carry as the step meets it."""

    field: int
    width: int


class Reset(NamedTuple):
    """A field of the carry, replaced by ``value`` where ``flags`` (a recipe of ``(*B)``) is ``on``."""

    field: int
    width: int
    flags: Any
    on: bool
    value: Any


@dataclass(frozen=True, eq=False)
class Gate:
    """An elementwise operation, and which of its results: equal to itself alone, since expressions share parts."""

    op: Any
    args: tuple[Any, ...]
    which: int
    width: int


class Held(NamedTuple):
    """``new`` where ``flags`` is ``on`` and ``old``, a field of the carry, elsewhere."""

    flags: Any
    on: bool
    new: Any
    old: Any
    width: int


class Value(NamedTuple):
    """An array: ``blocks`` side by side along its feature axis.

    ``axes`` names each axis: ``("b", i)`` a batch axis, ``"f"`` features, ``"g"`` groups of features, of which there
    are so many blocks, and ``"1"`` an axis of size one.
    """

    blocks: tuple[Any, ...]
    axes: tuple[Any, ...]


@dataclass(eq=False)
class _Elementwise:
    """An operation of gates, equal to others that do the same."""

    op: Op

    def __hash__(self) -> int:
        return hash(self.op.signature)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Elementwise) and self.op.signature == other.op.signature


# --- the form ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """What happens in the loop beside the product: each new field of the state, from arrays that broadcast to its shape.

    ``ops`` are elementwise operations and their operands: ``("u", i)``, ``("v", i)``, ``("sum", i)`` for ``u + v``,
    ``("theta", i)``, ``("state", i)``, ``("const", Const)`` or ``("op", j, which)``, a result of an earlier one.
    ``fields`` are the same kind of reference; ``summed`` says of each gate whether ``u + v`` is all that is used.
    """

    ops: tuple[tuple[Any, tuple[Any, ...]], ...]
    fields: tuple[Any, ...]
    summed: tuple[bool, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.ops, self.fields, self.summed))

    def __hash__(self) -> int:
        return self._hash

    def __call__(self, theta: Any, u: Any, v: Any, state: Any) -> list[Any]:
        """The new fields; arrays of any layout, since every operation is elementwise."""
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
        return [_spread(read(r), shape) for r in self.fields]


@dataclass(frozen=True)
class Affine:
    """The affine form of a step; everything in it but ``program`` and ``gates`` follows from the former.

    ``hidden`` is the field of the carry that is multiplied; ``fixed`` are the leaves of the carry that no step changes.
    ``inputs`` are the recipes of what the input product takes, side by side, ``input_weights`` of each gate, of each of
    these, the pieces that are added up; ``bias`` recipes (or None) of each gate. ``u`` are, instead of all these, the
    recipes of each gate's input part where it is no product. ``weights`` are the pieces of each gate's recurrent part.
    """

    program: Program
    gates: Gates
    consts: int
    carry: int
    fields: tuple[int, ...] = field(repr=False)
    fixed: tuple[int, ...] = field(repr=False)
    hidden: int
    units: int
    batch: tuple[int, ...]
    kinds: tuple[int, ...] = field(repr=False)
    inputs: tuple[Any, ...] = field(repr=False)
    input_weights: Any = field(repr=False)
    bias: tuple[Any, ...] = field(repr=False)
    u: Any = field(repr=False)
    weights: tuple[Any, ...] = field(repr=False)
    theta: tuple[Any, ...] = field(repr=False)
    resets: Any = field(repr=False)
    after: tuple[int, ...] = field(repr=False)

    def __hash__(self) -> int:
        return hash((self.program, self.consts, self.carry))

    def __eq__(self, other: Any) -> bool:
        return self is other or (
            isinstance(other, Affine)
            and (self.program, self.consts, self.carry) == (other.program, other.consts, other.carry)
        )


def read(program: Program, consts: int, carry: int) -> Affine:
    """The affine form of a step ``(consts, carry, x) -> (carry, y)``.

    Raises:
      Refusal: with the reason, where it has none.
    """
    return _Reader(program, consts, carry).form()


class _Reader:
    def __init__(self, program: Program, consts: int, carry: int) -> None:
        self.program, self.consts, self.carry = program, consts, carry
        outs, first = program.results[:carry], consts
        # What no step changes is as good as a constant.
        self.fixed = tuple(i for i in range(carry) if outs[i] == first + i)
        self.fields = tuple(i for i in range(carry) if i not in self.fixed)
        if not self.fields:
            raise Refusal("no leaf of the carry changes")
        self.kinds = self._kinds()
        self.made_by = {out: op for op in program.ops for out in op.outs}
        self.values: dict[int, Value] = {}
        self.resets: list[Reset] = []
        self.cuts: dict[Any, Any] = {}

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

    def kind(self, atom: Any) -> int:
        return self.kinds[atom] if isinstance(atom, int) else INVARIANT

    # --- the whole ---

    def form(self) -> Affine:
        program, first = self.program, self.consts
        self._fields()
        needed = self._needed([program.results[i] for i in self.fields], STATE)
        for op in program.ops:
            kind = max((self.kind(a) for a in op.ins), default=INVARIANT)
            if kind == STATE and id(op) in needed:
                self._follow(op)
            elif kind == INPUT:
                self._try(op)
        new = [self._new_field(program.results[i], i) for i in self.fields]
        self._no_raw_state(new)
        gates, parts = self._gates(new)
        after = self._after(needed)
        self._mappable(needed)
        return Affine(
            program, gates, self.consts, self.carry, self.fields, self.fixed, self.fields.index(parts["hidden"]),
            self.units, self.batch, tuple(self.kinds), parts["inputs"], parts["input_weights"], parts["bias"],
            parts["u"], parts["weights"], parts["theta"], self._reset_of(), after,
        )  # fmt: skip

    def _fields(self) -> None:
        """Gives the fields of the carry their values; all are ``(*B, H)``, of one float dtype."""
        forms = [self.program.forms[self.consts + i] for i in self.fields]
        shapes, dtypes = {form.shape for form in forms}, {form.dtype for form in forms}
        if len(shapes) != 1 or len(dtypes) != 1:
            raise Refusal(f"the leaves of its carry that change are not of one shape and dtype: {sorted(map(str, forms))}")
        (shape,), (dtype,) = shapes, dtypes
        if not shape or not all(shape):
            raise Refusal(f"its carry has the shape {shape}, where (*batch, units) is read")
        if not isinstance(dtype, np.dtype) or dtype.kind != "f" or dtype.itemsize < 4:
            raise Refusal(f"its carry is {dtype}, and float32 or float64 is read")
        self.batch, self.units, self.dtype = shape[:-1], shape[-1], dtype
        axes = (*(("b", i) for i in range(len(self.batch))), "f")
        for i in self.fields:
            self.values[self.consts + i] = Value((State(i, self.units),), axes)

    def _needed(self, atoms: Any, kind: int) -> set[int]:
        """The operations (by identity) of this kind that the atoms depend on."""
        needed: set[int] = set()
        wanted = {a for a in atoms if isinstance(a, int)}
        for op in reversed(self.program.ops):
            if wanted.intersection(op.outs):
                wanted.update(a for a in op.ins if isinstance(a, int))
                if max((self.kind(a) for a in op.ins), default=INVARIANT) == kind:
                    needed.add(id(op))
        return needed

    def _new_field(self, atom: Any, i: int) -> Any:
        if not isinstance(atom, int) or self.program.forms[atom] [:2] != self.program.forms[self.consts + i][:2]:
            raise Refusal("a leaf of its new carry is a constant, or of another shape or dtype")
        value = self.values.get(atom)
        if value is None:
            if self.kinds[atom] == STATE:
                raise Refusal("a leaf of its new carry was not followed")
            axes = (*(("b", i) for i in range(len(self.batch))), "f")
            return self._whole(self._known(atom, axes, (*self.batch, self.units)), self.units)
        return self._whole(value, self.units)

    def _whole(self, value: Value, width: int) -> Any:
        """A value of one vector for each sequence, as one expression."""
        axes = (*(("b", i) for i in range(len(self.batch))), "f")
        if value.axes != axes or sum(e.width for e in value.blocks) != width:
            raise Refusal("an array that depends on the state has other axes than batch and units")
        if len(value.blocks) > 1:
            raise Refusal("a leaf of its new carry is put together from parts of the units")
        return value.blocks[0]

    def _no_raw_state(self, new: list[Any]) -> None:
        """Raises where a state is reset in one place and used as it was in another, or held by several flags."""
        if not self.resets:
            return
        raw: set[int] = set()
        seen: set[int] = set()

        def visit(e: Any) -> None:
            if isinstance(e, State):
                raw.add(e.field)
            elif isinstance(e, Gate) and id(e) not in seen:
                seen.add(id(e))
                for a in e.args:
                    visit(a)
            elif isinstance(e, Sum):
                for piece in e.pieces:
                    if isinstance(piece.vector, State):
                        raw.add(piece.vector.field)
            elif isinstance(e, Held):
                visit(e.new), visit(e.old)

        for e in new:
            visit(e)
        kinds = {(r.flags, r.on) for r in self.resets}
        if raw or len(kinds) != 1 or {r.field for r in self.resets} != set(self.fields):
            raise Refusal("a part of its carry is replaced by flags and another part is not, or by other flags")
        values = {r.field: r.value for r in self.resets}
        if any(values[r.field] != r.value for r in self.resets):
            raise Refusal("a leaf of its carry is replaced by two different values")

    def _reset_of(self) -> Any:
        if not self.resets:
            return None
        values = {r.field: r.value for r in self.resets}
        return self.resets[0].flags, self.resets[0].on, tuple(values[i] for i in self.fields)

    # --- following an operation ---

    def _try(self, op: Op) -> None:
        """Of an operation that needs no state: its blocks where they can be told, else nothing is lost."""
        if len(op.outs) == 1 and op.name in ELEMENTWISE and op.name not in ("add", "sub", "add_any", "neg"):
            return
        try:
            self._follow(op)
        except Refusal:
            for out in op.outs:
                self.values.pop(out, None)

    def _follow(self, op: Op) -> None:
        name = op.name
        if name in ("copy", "copy_p") or (name == "convert_element_type" and self._same_dtype(op)):
            self.values[op.outs[0]] = self._value(op.ins[0])
        elif name == "dot_general":
            self.values[op.outs[0]] = self._dot(op)
        elif name in _REARRANGING:
            found = getattr(self, f"_{name}")(op)
            self.values.update(zip(op.outs, found, strict=True))
        elif name == "select_n" and (read := self._flagged(op)) is not None:
            self.values[op.outs[0]] = read
        elif name in ELEMENTWISE or op.derivative is not None:
            self._elementwise(op)
        else:
            raise Refusal(f"{name!r} of a value that depends on the state, in what the next state needs")

    def _same_dtype(self, op: Op) -> bool:
        return self.program.form(op.ins[0]).dtype == self.program.forms[op.outs[0]].dtype

    def _value(self, atom: Any) -> Value:
        if isinstance(atom, int) and atom in self.values:
            return self.values[atom]
        raise Refusal("an operation of an array whose axes are not known")

    def _known(self, atom: Any, axes: Any, shape: tuple[int, ...]) -> Value:
        """An array that needs no state, as one block of an array of this shape, on axes of which one is features."""
        if self.kind(atom) == STATE:
            raise Refusal("an operation whose result depends on the state could not be followed")
        if not self.program.form(atom).shape:
            recipe = ("atom", atom) if isinstance(atom, int) else ("const", atom)
            return Value((Sum((), recipe, -1),), axes)
        width = 1
        for size, axis in zip(shape, axes, strict=True):
            if axis in ("f", "g"):
                width *= size
        return Value((Sum((), self._canonical(atom, axes, shape), width),), axes)

    def _canonical(self, atom: Any, axes: Any, outer: tuple[int, ...]) -> Any:
        """The recipe of ``(*B, F)``, ``(F)`` or ``()`` that an array is which broadcasts to ``outer`` on these axes."""
        recipe: Any = ("atom", atom) if isinstance(atom, int) else ("const", atom)
        shape = self.program.form(atom).shape
        if not shape:
            return recipe
        names: list[Any] = ["1" if n == 1 and o != 1 else a for n, o, a in zip(shape, outer, axes, strict=True)]
        # Through what only adds axes: a bias is to stay a vector.
        while isinstance(atom, int) and atom in self.made_by:
            op = self.made_by[atom]
            if op.name == "broadcast_in_dim" and len(op.ins) == 1:
                source, dims = op.ins[0], op.params["broadcast_dimensions"]
                inner = self.program.form(source).shape
                names = ["1" if n == 1 and shape[d] != 1 else names[d] for n, d in zip(inner, dims, strict=True)]
            elif op.name in ("reshape", "expand_dims") and len(op.ins) == 1:
                source = op.ins[0]
                inner = self.program.form(source).shape
                found = _added_axes(inner, shape)
                if found is None:
                    break
                names = [names[i] for i in found]
            else:
                break
            atom, shape = source, inner
            recipe = ("atom", atom) if isinstance(atom, int) else ("const", atom)
        batch = [("b", i) for i in range(len(self.batch))]
        order = [n for n in (*batch, "g", "f") if n in names]
        found = [n for n in order if isinstance(n, tuple)]
        if found and found != batch:
            raise Refusal("an array that has some of the batch axes and not others")
        if "g" in order and "f" not in order:
            raise Refusal("an array of groups whose features are broadcast")
        ordered = self._take(recipe, shape, names, order)
        if found and "f" not in order:
            return ("per sequence", ordered)
        return ("flat", ordered, 2) if "g" in order else ordered

    def _take(self, recipe: Any, shape: Any, names: Any, order: Any) -> Any:
        ranges = tuple((0, size) if name in order else None for name, size in zip(names, shape, strict=True))
        if any(r is None and size != 1 for r, size in zip(ranges, shape, strict=True)):
            raise Refusal("an array that is broadcast along an axis of other sizes")
        kept = [name for name in names if name in order]
        permutation = tuple(kept.index(name) for name in order)
        if all(r is not None for r in ranges) and permutation == tuple(range(len(order))):
            return recipe
        return ("take", recipe, ranges, permutation)

    def cut(self, e: Any, start: int, stop: int) -> Any:
        """Columns ``start`` to ``stop`` of an expression."""
        if e.width == -1 or (start, stop) == (0, e.width):
            return e
        width = stop - start
        if isinstance(e, Sum):
            pieces = tuple(p._replace(start=p.start + start, stop=p.start + stop) for p in e.pieces)
            return Sum(pieces, self._cut_known(e.known, start, stop), width)
        if isinstance(e, Gate):
            # Once for each expression and range, since expressions share parts.
            key = (id(e), start, stop)
            if key not in self.cuts:
                args = tuple(self.cut(a, start, stop) for a in e.args)
                self.cuts[key] = (Gate(e.op, args, e.which, width), e)
            return self.cuts[key][0]
        raise Refusal("a part of the units of the state is taken")

    def _cut_known(self, recipe: Any, start: int, stop: int) -> Any:
        if recipe is None or self._scalar(recipe):
            return recipe
        if recipe[0] == "add":
            return ("add", *(self._cut_known(r, start, stop) for r in recipe[1:]))
        if recipe[0] == "neg":
            return ("neg", self._cut_known(recipe[1], start, stop))
        if recipe[0] == "per sequence":
            return recipe
        shape = self._shape(recipe)
        ranges = (*((0, n) for n in shape[:-1]), (start, stop))
        return ("take", recipe, ranges, tuple(range(len(shape))))

    def _shape(self, recipe: Any) -> tuple[int, ...]:
        kind = recipe[0]
        if kind == "atom":
            return self.program.forms[recipe[1]].shape
        if kind == "const":
            return recipe[1].form.shape
        if kind == "add":
            return tuple(np.broadcast_shapes(self._shape(recipe[1]), self._shape(recipe[2])))
        if kind == "neg":
            return self._shape(recipe[1])
        if kind == "per sequence":
            return (*self._shape(recipe[1]), 1)
        if kind == "flat":
            shape = self._shape(recipe[1])
            return (*shape[: -recipe[2]], int(np.prod(shape[-recipe[2] :])))
        sizes = [r[1] - r[0] for r in recipe[2] if r is not None]
        return tuple(sizes[i] for i in recipe[3])

    def _scalar(self, recipe: Any) -> bool:
        return self._shape(recipe) == ()

    def kind_of(self, recipe: Any) -> int:
        """Whether a recipe needs x."""
        if recipe is None or recipe[0] == "const":
            return INVARIANT
        if recipe[0] == "atom":
            return self.kinds[recipe[1]]
        return max(self.kind_of(r) for r in recipe[1:] if isinstance(r, tuple) and r and isinstance(r[0], str))

    # --- elementwise operations ---

    def _elementwise(self, op: Op) -> None:
        shape = self.program.forms[op.outs[0]].shape
        axes = None
        for atom in op.ins:
            if isinstance(atom, int) and atom in self.values and self.program.forms[atom].shape == shape:
                axes = self.values[atom].axes
                break
        if axes is None or len(axes) != len(shape):
            raise Refusal(f"{op.name!r} broadcasts what depends on the state")
        operands = []
        for atom in op.ins:
            own = self.program.form(atom).shape
            if isinstance(atom, int) and atom in self.values:
                value = self.values[atom]
                if own != shape or value.axes != axes:
                    raise Refusal(f"{op.name!r} of arrays whose axes lie differently")
            else:
                value = self._known(atom, axes, shape)
            operands.append(value)
        cuts = _common(operands)
        if any(self.program.forms[out].dtype != self.dtype and self.program.forms[out].dtype != np.bool_ for out in op.outs):
            raise Refusal(f"{op.name!r} makes {self.program.forms[op.outs[0]].dtype} of what depends on the state")
        results: list[list[Any]] = [[] for _ in op.outs]
        for start, stop in cuts:
            args = [self._at(value, start, stop) for value in operands]
            for which, found in enumerate(results):
                found.append(self._apply(op, args, which, stop - start))
        for out, found in zip(op.outs, results, strict=True):
            self.values[out] = Value(tuple(found), axes)

    def _at(self, value: Value, start: int, stop: int) -> Any:
        if value.blocks[0].width == -1:
            return value.blocks[0]
        at = 0
        for block in value.blocks:
            if at <= start and stop <= at + block.width:
                return self.cut(block, start - at, stop - at)
            at += block.width
        raise Refusal("blocks that do not fit")

    def _apply(self, op: Op, args: list[Any], which: int, width: int) -> Any:
        if op.name in ("add", "add_any", "sub") and all(isinstance(a, Sum) for a in args):
            a, b = args
            if op.name == "sub":
                b = None if b.pieces else b._replace(known=("neg", b.known))
            if b is not None:
                known = a.known if b.known is None else b.known if a.known is None else ("add", a.known, b.known)
                return Sum((*a.pieces, *b.pieces), known, width)
        if any(isinstance(a, Held) for a in args):
            raise Refusal("a state that is held is used further")
        return Gate(_Elementwise(op), tuple(args), which, width)

    def _flagged(self, op: Op) -> Value | None:
        """A select by a flag of each sequence: a reset or a mask; None where it is an operation of gates."""
        flags, *cases = op.ins
        if self.kind(flags) == STATE or len(cases) != 2:
            return None
        states = [a for a in cases if isinstance(a, int) and a in self.values]
        if not states:
            return None
        axes, shape = self.values[states[0]].axes, self.program.form(states[0]).shape
        recipe = self._canonical(flags, axes, shape)
        if recipe[0] == "per sequence":
            recipe = recipe[1]
        elif not self._scalar(recipe):
            return None
        values = [self.values[a] if a in self.values else self._known(a, axes, shape) for a in cases]
        if any(len(v.blocks) != 1 or v.axes != axes for v in values):
            return None
        (off,), (on,) = values[0].blocks, values[1].blocks
        for e, other, is_on in ((off, on, True), (on, off, False)):
            # The flag is on where the other one is taken.
            if isinstance(e, State) and isinstance(other, Sum) and not other.pieces:
                if self.kind_of(other.known) != INVARIANT:
                    return None
                reset = Reset(e.field, e.width, recipe, is_on, other.known)
                self.resets.append(reset)
                return Value((reset,), axes)
        for old, new, is_on in ((off, on, True), (on, off, False)):
            if isinstance(old, State | Reset):
                return Value((Held(recipe, is_on, new, old, new.width),), axes)
        return None

    # --- rearranging ---

    def _split(self, op: Op) -> list[Value]:
        value, axis = self._value(op.ins[0]), op.params["axis"]
        out, at = [], 0
        for size in op.params["sizes"]:
            out.append(self._range(value, self.program.form(op.ins[0]).shape, axis, at, at + int(size)))
            at += int(size)
        return out

    def _slice(self, op: Op) -> list[Value]:
        value, shape = self._value(op.ins[0]), self.program.form(op.ins[0]).shape
        starts, stops, strides = (op.params[n] for n in ("start_indices", "limit_indices", "strides"))
        if strides is not None and any(s != 1 for s in strides):
            raise Refusal("a slice with strides of what depends on the state")
        for axis, (start, stop, size) in enumerate(zip(starts, stops, shape, strict=True)):
            if (start, stop) != (0, size):
                value = self._range(value, shape, axis, start, stop)
        return [value]

    def _range(self, value: Value, shape: Any, axis: int, start: int, stop: int) -> Value:
        name = value.axes[axis]
        if name == "f" and "g" in value.axes:
            raise Refusal("a part of the units of each group")
        if name not in ("f", "g"):
            raise Refusal("a part of the batch")
        if name == "g":
            width = sum(b.width for b in value.blocks) // shape[axis]
            start, stop = start * width, stop * width
        found, at = [], 0
        for block in value.blocks:
            low, high = max(start, at), min(stop, at + block.width)
            if low < high:
                found.append(self.cut(block, low - at, high - at))
            at += block.width
        return Value(tuple(found), value.axes)

    def _concatenate(self, op: Op) -> list[Value]:
        axis = op.params["dimension"]
        known = [a for a in op.ins if isinstance(a, int) and a in self.values]
        if not known:
            raise Refusal("no axes are known")
        states = [a for a in known if self.kind(a) == STATE]
        axes = self.values[(states or known)[0]].axes
        if axes[axis] not in ("f", "g") or (axes[axis] == "f" and "g" in axes):
            raise Refusal("arrays put together along another axis than that of features")
        blocks: list[Any] = []
        for atom in op.ins:
            value = self.values.get(atom) if isinstance(atom, int) else None
            value = self._known(atom, axes, self.program.form(atom).shape) if value is None else value
            if value.axes != axes or value.blocks[0].width == -1:
                raise Refusal("arrays put together whose axes lie differently")
            blocks += value.blocks
        return [Value(tuple(blocks), axes)]

    def _transpose(self, op: Op) -> list[Value]:
        value = self._value(op.ins[0])
        return [Value(value.blocks, tuple(value.axes[i] for i in op.params["permutation"]))]

    def _reshape(self, op: Op) -> list[Value]:
        old, new = self.program.form(op.ins[0]).shape, self.program.forms[op.outs[0]].shape
        value = self._value(op.ins[0])
        if op.params.get("dimensions") is not None:
            raise Refusal("a reshape with axes in another order")
        # Without axes of size one, either the same, or features in groups, or groups as features.
        sized = [(n, a) for n, a in zip(old, value.axes, strict=True) if a != "1"]
        axes: list[Any] = []
        rest = list(sized)
        for size in new:
            if rest and rest[0][0] == size:
                axes.append(rest.pop(0)[1])
            elif size == 1:
                axes.append("1")
            elif rest and rest[0][1] == "f" and "g" not in value.axes and rest[0][0] % size == 0:
                axes.append("g")
                rest[0] = (rest[0][0] // size, "f")
            elif len(rest) > 1 and (rest[0][1], rest[1][1]) == ("g", "f") and rest[0][0] * rest[1][0] == size:
                axes.append("f")
                del rest[:2]
            else:
                raise Refusal("a reshape that mixes axes of what depends on the state")
        if rest:
            if all(n == 1 and a != "f" for n, a in rest):
                raise Refusal("a reshape that drops a batch axis")
            raise Refusal("a reshape that mixes axes of what depends on the state")
        if axes.count("f") != 1:
            raise Refusal("a reshape that mixes axes of what depends on the state")
        return [Value(value.blocks, tuple(axes))]

    def _squeeze(self, op: Op) -> list[Value]:
        value, shape = self._value(op.ins[0]), self.program.form(op.ins[0]).shape
        dropped = [d % len(shape) for d in op.params["dimensions"]]
        if any(value.axes[d] not in ("1", "g") for d in dropped):
            raise Refusal("an axis of the batch or of units is dropped")
        return [Value(value.blocks, tuple(a for i, a in enumerate(value.axes) if i not in dropped))]

    def _expand_dims(self, op: Op) -> list[Value]:
        value, ndim = self._value(op.ins[0]), len(self.program.forms[op.outs[0]].shape)
        added = [d % ndim for d in op.params["dimensions"]]
        rest = iter(value.axes)
        return [Value(value.blocks, tuple("1" if i in added else next(rest) for i in range(ndim)))]

    def _broadcast_in_dim(self, op: Op) -> list[Value]:
        value, inner = self._value(op.ins[0]), self.program.form(op.ins[0]).shape
        shape, dims = op.params["shape"], op.params["broadcast_dimensions"]
        axes: list[Any] = ["1"] * len(shape)
        for size, axis, d in zip(inner, value.axes, dims, strict=True):
            axes[d] = axis
            if shape[d] != size:
                raise Refusal("what depends on the state is broadcast")
        if any(n != 1 and a == "1" for n, a in zip(shape, axes, strict=True)):
            raise Refusal("what depends on the state is broadcast")
        return [Value(value.blocks, tuple(axes))]

    # --- products ---

    def _dot(self, op: Op) -> Value:
        (contract, batched) = op.params["dimension_numbers"]
        if any(batched) or any(len(c) != 1 for c in contract):
            raise Refusal("a product with batch axes, or over several axes, of what depends on the state")
        precision = op.params.get("precision")
        if precision is not None and any(
            p not in (None, jax.lax.Precision.DEFAULT) for p in (precision if isinstance(precision, tuple) else (precision,))
        ):
            raise Refusal("a product that asks for a precision")
        if any(self.program.form(a).dtype != self.dtype for a in (*op.ins, *op.outs)):
            raise Refusal("a product of other dtypes than that of the state")
        kinds = [self.kind(a) for a in op.ins]
        if min(kinds) != INVARIANT or max(kinds) == INVARIANT:
            raise Refusal("a product of two arrays that both change from step to step")
        side = 0 if kinds[0] != INVARIANT else 1  # that of the vector
        vector, weights = op.ins[side], op.ins[1 - side]
        (v_axis,), (w_axis,) = contract[side], contract[1 - side]
        v_shape, w_shape = self.program.form(vector).shape, self.program.form(weights).shape
        value = self._vector(vector, v_shape, v_axis)
        if "g" in value.axes or value.axes[v_axis] != "f" or not 2 <= len(w_shape) <= 3:
            raise Refusal("a product over another axis than that of the units, or with weights of many axes")
        free = [i for i in range(len(w_shape)) if i != w_axis]
        recipe: Any = ("atom", weights) if isinstance(weights, int) else ("const", weights)
        order = (w_axis, *free)
        if order != tuple(range(len(w_shape))):
            recipe = ("take", recipe, tuple((0, n) for n in w_shape), order)
        if len(free) == 2:
            recipe = ("flat", recipe, 2)
        width = int(np.prod([w_shape[i] for i in free]))
        pieces, row = [], 0
        for block in value.blocks:
            rows = recipe
            if len(value.blocks) > 1:
                rows = ("take", recipe, ((row, row + block.width), (0, width)), (0, 1))
            pieces.append(Piece(self._factor(block), rows, 0, width))
            row += block.width
        own = [a for i, a in enumerate(value.axes) if i != v_axis]
        made = ["f"] if len(free) == 1 else ["g", "f"]
        return Value((Sum(tuple(pieces), None, width),), tuple([*own, *made] if side == 0 else [*made, *own]))

    def _vector(self, atom: int, shape: Any, axis: int) -> Value:
        """The factor of a product that is no weight, where needed with its axes guessed: that of features is known."""
        if self.kind(atom) == STATE:
            return self._value(atom)
        # What needs no state is taken as it is: its own products stay outside.
        names = iter(("b", i) for i in range(len(shape)))
        axes = tuple("f" if i == axis else next(names) for i in range(len(shape)))
        if tuple(n for n, a in zip(shape, axes, strict=True) if a != "f") != self.batch:
            raise Refusal("a product of an array without the batch axes of the carry")
        return Value((Sum((), self._canonical_full(atom, axes), shape[axis]),), axes)

    def _canonical_full(self, atom: int, axes: Any) -> Any:
        names = (*(("b", i) for i in range(len(self.batch))), "f")
        return self._take(("atom", atom), self.program.forms[atom].shape, axes, names)

    def _factor(self, e: Any) -> Any:
        """What is multiplied: a field of the state, or a recipe."""
        if isinstance(e, State | Reset):
            return e
        if isinstance(e, Sum) and not any(isinstance(p.vector, State | Reset) for p in e.pieces):
            return self._recipe(e)
        raise Refusal("it has a product of something computed from the state, and not of the state itself")

    def _recipe(self, e: Sum) -> Any:
        """A sum that needs no state, as a recipe."""
        terms = [("dot", p.vector, ("take", p.weights, ((0, self._shape(p.weights)[0]), (p.start, p.stop)), (0, 1)))
                 for p in e.pieces]  # fmt: skip
        if e.known is not None:
            terms.append(e.known)
        return functools.reduce(lambda a, b: ("add", a, b), terms)

    # --- gates ---

    def _gates(self, new: list[Any]) -> tuple[Gates, dict[str, Any]]:
        held = {(e.flags, e.on) for e in new if isinstance(e, Held)}
        if held:
            raise Refusal("its new carry is held where a flag says so")
        sums: list[Sum] = []

        seen: set[int] = set()

        def collect(e: Any) -> None:
            if isinstance(e, Sum) and e not in sums:
                sums.append(e)
            elif isinstance(e, Gate) and id(e) not in seen:
                seen.add(id(e))
                for a in e.args:
                    collect(a)

        for e in new:
            collect(e)
        recurrent = [self._recurrent(e) for e in sums]
        vectors = {p.vector.field for pieces, _ in recurrent for p in pieces}
        if len(vectors) != 1:
            raise Refusal(
                "it has no product of its state with weights" if not vectors else "it has products of several of its states"
            )
        for e, (pieces, _) in zip(sums, recurrent, strict=True):
            if pieces and e.width != self.units:
                raise Refusal(f"a product of {e.width} columns, where the state has {self.units} units")
        used = [pieces for pieces, _ in recurrent if pieces]
        summed: list[tuple[Any, Any]] = []  # (u, v) that are added
        alone_u: list[Any] = []
        alone_v: list[Any] = []
        thetas: list[Any] = []
        plan: dict[int, Any] = {}

        def index(items: list[Any], item: Any) -> int:
            if item not in items:
                items.append(item)
            return items.index(item)

        # First each sum's role; places among gates follow once all are known.
        for i, (pieces, u) in enumerate(recurrent):
            changes = u is not None and (u.pieces or self.kind_of(u.known) == INPUT or self._per_sequence(u.known))
            if pieces and changes and used.count(pieces) == 1:
                summed.append((u, pieces))
                plan[i] = ("summed", len(summed) - 1)
            else:
                v = index(alone_v, pieces) if pieces else None
                if u is None:
                    place = None
                elif changes:
                    place = ("u", index(alone_u, u))
                elif self._constant(u.known):
                    place = ("const", u.known[1])
                else:
                    place = ("theta", index(thetas, u.known))
                plan[i] = ("apart", place, v)
        count = len(summed) + max(len(alone_u), len(alone_v))
        u_parts = [u for u, _ in summed] + alone_u + [None] * (count - len(summed) - len(alone_u))
        v_parts = [v for _, v in summed] + alone_v + [()] * (count - len(summed) - len(alone_v))
        flags = (True,) * len(summed) + (False,) * (count - len(summed))
        first = len(summed)
        done: dict[Any, Any] = {}
        ops: list[Any] = []

        def operation(made: Any, operands: tuple[Any, ...], which: int = 0) -> Any:
            if (made, operands) not in ops:
                ops.append((made, operands))
            return ("op", ops.index((made, operands)), which)

        def write(e: Any) -> Any:
            if e in done:
                return done[e]
            if isinstance(e, State | Reset):
                out: Any = ("state", self.fields.index(e.field))
            elif isinstance(e, Gate):
                out = operation(e.op, tuple(write(a) for a in e.args), e.which)
            else:
                role, place, *rest = plan[sums.index(e)]
                if role == "summed":
                    out = ("sum", place)
                else:
                    (v,) = rest
                    place = ("u", first + place[1]) if place is not None and place[0] == "u" else place
                    recurrent_part = ("v", first + v) if v is not None else None
                    if place is not None and recurrent_part is not None:
                        out = operation(_ADD, (recurrent_part, place))
                    else:
                        out = recurrent_part if place is None else place
            done[e] = out
            return out

        fields = tuple(write(e) for e in new)
        gates = Gates(tuple(ops), fields, flags)
        inputs, input_weights, bias, u = self._inputs(u_parts)
        (self.hidden,) = vectors
        parts = {
            "hidden": self.hidden, "inputs": inputs, "input_weights": input_weights, "bias": bias, "u": u,
            "weights": tuple(v_parts), "theta": tuple(thetas),
        }  # fmt: skip
        return gates, parts

    def _recurrent(self, e: Sum) -> tuple[tuple[Piece, ...], Sum | None]:
        """The pieces of the recurrent product, in order, and the rest of a sum."""
        pieces = tuple(sorted((p for p in e.pieces if isinstance(p.vector, State | Reset)), key=repr))
        rest = tuple(p for p in e.pieces if not isinstance(p.vector, State | Reset))
        return pieces, Sum(rest, e.known, e.width) if rest or e.known is not None else None

    def _per_sequence(self, recipe: Any) -> bool:
        """Whether a recipe has batch axes (so that it is no vector)."""
        return recipe is not None and (recipe[0] == "per sequence" or len(self._shape(recipe)) > 1)

    def _constant(self, recipe: Any) -> bool:
        return recipe[0] == "const" and self._scalar(recipe)

    def _inputs(self, parts: list[Any]) -> Any:
        """The gates' input parts as one product of x with weights, or else as recipes of their own."""
        vectors: list[Any] = []
        for u in parts:
            for p in u.pieces if u is not None else ():
                if p.vector not in vectors:
                    vectors.append(p.vector)
        biases = [None if u is None else u.known for u in parts]
        if vectors and all(b is None or (self.kind_of(b) == INVARIANT and not self._per_sequence(b)) for b in biases):
            table = tuple(
                tuple(tuple(p for p in (u.pieces if u is not None else ()) if p.vector == x) for x in vectors)
                for u in parts
            )
            return tuple(vectors), table, tuple(biases), None
        return (), (), (), tuple(None if u is None else self._recipe(u) for u in parts)

    # --- outputs ---

    def _after(self, needed: set[int]) -> tuple[int, ...]:
        """The variables of the loop that the outputs depend on: the hidden state alone, as met or as left."""
        program = self.program
        outs = [a for a in program.results[self.carry :] if isinstance(a, int)]
        hidden = self.hidden
        given = {program.results[hidden], self.consts + hidden}
        wanted = {a for a in outs if self.kinds[a] == STATE}
        met: set[int] = set()
        for op in reversed(program.ops):
            found = wanted.intersection(op.outs)
            if not found or self.kinds[op.outs[0]] != STATE:
                continue
            for out in op.outs:
                if out in wanted and out in given:
                    met.add(out)
            if not found - given:
                continue
            if op.name in UNMAPPABLE:
                raise Refusal(f"its output depends on {op.name!r} of the state")
            wanted.update(a for a in op.ins if isinstance(a, int) and self.kinds[a] == STATE)
        entering = {a for a in wanted if a < program.inputs}
        if entering - given:
            raise Refusal("its output depends on more of its carry than what is multiplied")
        return tuple(sorted(met | entering))

    def _mappable(self, needed: set[int]) -> None:
        """Raises where something that needs no state is better left in the loop."""
        for op in self.program.ops:
            if self.kinds[op.outs[0]] == INPUT and op.name in UNMAPPABLE:
                raise Refusal(f"it computes {op.name!r} of its input, which is left at its step")


_REARRANGING = ("broadcast_in_dim", "concatenate", "expand_dims", "reshape", "slice", "split", "squeeze", "transpose")


@functools.lru_cache(maxsize=1)
def _add_op() -> _Elementwise:
    from jrnn.jaxprs.flat import flatten

    form = jax.ShapeDtypeStruct((), np.float32)
    program, _ = flatten(jax.make_jaxpr(jax.lax.add)(form, form))
    return _Elementwise(program.ops[0])


_ADD: Any = _add_op()


def _added_axes(inner: tuple[int, ...], outer: tuple[int, ...]) -> list[int] | None:
    """Where each axis of ``inner`` is in ``outer``, which has more axes of size one; None where it is something else."""
    found, at = [], 0
    for size in inner:
        while at < len(outer) and outer[at] == 1 and size != 1:
            at += 1
        if at == len(outer) or outer[at] != size:
            return None
        found.append(at)
        at += 1
    return found if all(n == 1 for n in outer[at:]) else None


def _common(values: list[Value]) -> list[tuple[int, int]]:
    """The ranges of features on which all values have one block each."""
    edges: set[int] = set()
    for value in values:
        if value.blocks[0].width == -1:
            continue
        at = 0
        edges.add(0)
        for block in value.blocks:
            at += block.width
            edges.add(at)
    ordered = sorted(edges)
    return list(zip(ordered, ordered[1:], strict=False))


def outside(form: Affine, kind: int, wanted: Any) -> tuple[Op, ...]:
    """The operations of a kind that recipes and variables need, in order."""
    names: set[int] = set()

    def visit(recipe: Any) -> None:
        if isinstance(recipe, int):
            names.add(recipe)
        elif isinstance(recipe, tuple) and recipe and recipe[0] == "atom":
            names.add(recipe[1])
        elif isinstance(recipe, tuple) and recipe and recipe[0] != "const":
            for part in recipe:
                if isinstance(part, tuple):
                    visit(part)

    for recipe in wanted:
        visit(recipe)
    ops = []
    for op in reversed(form.program.ops):
        if names.intersection(op.outs):
            names.update(a for a in op.ins if isinstance(a, int))
            if form.kinds[op.outs[0]] == kind:
                ops.append(op)
    return tuple(reversed(ops))


__all__ += ["Piece", "State", "evaluate", "make", "outside", "INPUT", "INVARIANT", "STATE", "Shaped"]
