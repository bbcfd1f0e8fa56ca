"""What may be assumed of a cell's gates: what the cell promises, and what can be read from the traced gates.

Gates that act on each unit by itself are the same program for every unit. `Reader` reads a function that was traced on
whole arrays as that program. Because it is read from whole arrays, a size that the gates look up is a number in the
program, and programs that are read at several shapes are equal only where the gates depend on no size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jrnn._core.checks import same_form
from jrnn.jaxprs.primitives import ELEMENTWISE, SAME, called

# The places of operands in each of which by itself an operation is linear, and in all of which together it is.
_LINEAR = {"convert_element_type": (0,), "div": (0,), "mul": (0, 1), "neg": (0,)}
_SUMS = {"add": (0, 1), "add_any": (0, 1), "select_n": (1, 2), "sub": (0, 1)}


def elementwise(cell: Any, theta: Any, state: Any) -> bool:
    """Whether the gates act on each unit by itself, however the axes of their operands stand, and theta is vectors.

    Where the gates and their derivative can be read, this is what was read, unless the cell declares the contrary.
    Where they cannot be read, it is what the cell declares.
    """
    if cell.elementwise is False or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return False
    return _is_elementwise(cell, Forms.of(theta, state))


def sums(cell: Any, theta: Any, state: Any) -> tuple[bool, ...]:
    """For each gate, whether it uses only ``u + v``."""
    if cell.additive is not None or any(jnp.ndim(leaf) != 1 for leaf in jax.tree.leaves(theta)):
        return tuple(cell.sums)
    return _sums(cell, Forms.of(theta, state))


# --- reading a traced function -----------------------------------------------------------------------------------


_TRACED = "they use a value that is being traced by JAX; make it one of the parameters beside the weights"


class Unread(Exception):
    """Why a function could not be read as one program for every unit."""


class Operation(NamedTuple):
    """An operation of a program for one unit; operands are places in `Reader.operations`.

    The names are those of JAX, and three more: ``argument`` with its number, ``constant`` with the bytes of a number
    that is the same for all units, and ``table`` with the bytes of one number for each unit.
    """

    name: str
    params: tuple[Any, ...]
    operands: tuple[int, ...]
    dtype: np.dtype[Any]


class _Unit(NamedTuple):
    """An array that the program computes.

    Each of its axes is named: "units", the number of a batch axis, or None where the array does not vary along it. Of
    an array that is summed over sequences, which gradients of vectors are, the program computes the terms.
    """

    place: int
    axes: tuple[Any, ...]
    summed: bool = False


class _Known(NamedTuple):
    """An array that does not depend on the arguments."""

    array: Any


# What could not be read is the reason why, which is raised where a result is made of it.
_Value = _Unit | _Known | Unread


class Reader:
    """Reads traced functions of whole arrays as programs for one unit, all into one list of operations.

    Equal operations have the same place in the list, so two functions do the same to every unit if, and only if, the
    places of their results are equal.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._places: dict[Operation, int] = {}

    def read(self, function: Any, arguments: Any, axes: Any) -> tuple[int, ...]:
        """The places of the results of ``function(*arguments)``.

        Args:
          function: takes arrays and returns arrays.
          arguments: pytrees of `jax.ShapeDtypeStruct`.
          axes: for each leaf of ``arguments``, the names of its axes.

        Raises:
          Unread: where the function does not do the same to every unit, or it cannot be seen that it does.
        """
        try:
            traced = jax.make_jaxpr(function)(*arguments)
        except Exception as error:
            raise Unread(f"JAX cannot trace them, or their derivative ({type(error).__name__}: {error})") from error
        inputs: list[_Value] = []
        forms: dict[tuple[int, ...], tuple[Any, ...]] = {}
        for i, (leaf, names) in enumerate(zip(jax.tree.leaves(arguments), axes, strict=True)):
            # Along an axis of one element nothing varies.
            names = tuple(None if size == 1 else name for name, size in zip(names, leaf.shape, strict=True))
            inputs.append(_Unit(self._place("argument", (i,), (), leaf.dtype), names))
            forms[leaf.shape] = names
        results = self._run(traced.jaxpr, traced.consts, inputs)
        return tuple(self._result(r, atom.aval, forms) for r, atom in zip(results, traced.jaxpr.outvars, strict=True))

    def live(self, results: tuple[int, ...]) -> list[int]:
        """The places of all operations that the results are made of, in an order in which they can run."""
        needed, left = set(results), list(results)
        while left:
            for place in self.operations[left.pop()].operands:
                if place not in needed:
                    needed.add(place)
                    left.append(place)
        return sorted(needed)

    def _place(self, name: str, params: Any, operands: tuple[int, ...], dtype: Any) -> int:
        operation = Operation(name, params, operands, np.dtype(dtype))
        if operation not in self._places:
            self._places[operation] = len(self.operations)
            self.operations.append(operation)
        return self._places[operation]

    def _run(self, jaxpr: Any, consts: Any, inputs: Any) -> list[_Value]:
        env: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Known, consts), strict=True))
        # Arguments that a called program does not take (residuals of its derivative) come first.
        env.update(zip(jaxpr.invars, inputs[len(inputs) - len(jaxpr.invars) :], strict=True))

        def value(atom: Any) -> _Value:
            if isinstance(atom, jax.extend.core.Literal):
                return _Known(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
            return env[atom]

        for eqn in jaxpr.eqns:
            if eqn.effects:  # a program for one unit has none, and nothing may be made of its results
                raise Unread(f"{eqn.primitive.name!r} in them has a side effect")
            try:
                outs = self._outs(eqn, [value(atom) for atom in eqn.invars])
            except Unread as reason:
                outs = [reason] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _outs(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name == "optimization_barrier" or name in SAME:
            return values
        if (program := called(eqn)) is not None:
            return self._run(*program, values)
        if name == "cond" and isinstance(values[0], _Known):
            branches = eqn.params["branches"]
            chosen = branches[min(max(int(_concrete(values[0].array)), 0), len(branches) - 1)]
            return self._run(chosen.jaxpr, chosen.consts, values[1:])
        for reason in values:
            if isinstance(reason, Unread):
                raise reason
        known = [value.array for value in values if isinstance(value, _Known)]
        if len(known) == len(values):
            return [_Known(array) for array in _folded(eqn, known)]
        unknown = f"{name!r} in them, or in their derivative, is not known to act on each unit by itself"
        if len(eqn.outvars) != 1:
            raise Unread(unknown)
        if (moved := _moved(eqn, values[0])) is not None:
            return [moved]
        if name not in ELEMENTWISE:
            raise Unread(unknown)
        return [self._elementwise(eqn, values)]

    def _elementwise(self, eqn: Any, values: Any) -> _Unit:
        out = eqn.outvars[0].aval
        axes: list[Any] = [None] * out.ndim
        for value in values:
            if not isinstance(value, _Unit) or len(value.axes) != out.ndim:
                continue
            for axis, name in enumerate(value.axes):
                if name is not None and axes[axis] not in (None, name):
                    raise Unread("they combine different axes of their arguments")
                axes[axis] = axes[axis] if name is None else name
        operands = tuple(self._constant(v.array, axes) if isinstance(v, _Known) else v.place for v in values)
        params = tuple((key, _hashable(value)) for key, value in sorted(eqn.params.items()))
        place = self._place(eqn.primitive.name, params, operands, out.dtype)
        return _Unit(place, tuple(axes), _is_summed_by(eqn.primitive.name, values))

    def _constant(self, array: Any, axes: Any) -> int:
        """A known array as a number, or as a table of one number for each unit."""
        array = _concrete(array)
        varying = _strides(array)
        flat = array[tuple(slice(None) if axis in varying else 0 for axis in range(array.ndim))]
        varying = [axis for i, axis in enumerate(varying) if not _is_same_along(flat, i)]
        flat = array[tuple(slice(None) if axis in varying else 0 for axis in range(array.ndim))]
        if not varying:
            return self._place("constant", (flat.tobytes(),), (), array.dtype)
        if [axes[axis] for axis in varying] != ["units"]:
            raise Unread("they use a constant array that differs between sequences")
        return self._place("table", (flat.tobytes(),), (), array.dtype)

    def _result(self, value: _Value, aval: Any, forms: dict[tuple[int, ...], tuple[Any, ...]]) -> int:
        if (expected := forms.get(aval.shape)) is None:
            raise Unread("they return arrays of another shape than the state's")
        if isinstance(value, Unread):
            raise value
        # What belongs to no sequence is a gradient, which is summed over all of them.
        batched = [any(isinstance(name, int) for name in axes) for axes in forms.values()]
        summed = any(batched) and not any(isinstance(name, int) for name in expected)
        if isinstance(value, _Known):
            if summed and np.any(value.array):
                raise Unread("what they return for one sequence depends on others")
            return self._constant(value.array, expected)
        if value.summed != summed:
            raise Unread("what they return for one sequence depends on others")
        if any(name not in (None, wanted) for name, wanted in zip(value.axes, expected, strict=True)):
            raise Unread("they return arrays whose axes stand in another order than the state's")
        return value.place


def _moved(eqn: Any, value: Any) -> _Unit | None:
    """The result of an operation that only moves, adds or drops axes, or sums over sequences; None for any other."""
    if not isinstance(value, _Unit):
        return None
    name, params, old = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    new, axes = eqn.outvars[0].aval.shape, value.axes
    if name == "broadcast_in_dim":
        moved: list[Any] = [None] * len(new)
        for axis, to in enumerate(params["broadcast_dimensions"]):
            moved[to] = axes[axis]
        return value._replace(axes=tuple(moved))
    if name == "transpose":
        return value._replace(axes=tuple(axes[axis] for axis in params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims") and [n for n in old if n != 1] == [n for n in new if n != 1]:
        kept = iter([axis for axis, size in zip(axes, old, strict=True) if size != 1])
        return value._replace(axes=tuple(None if size == 1 else next(kept) for size in new))
    if name == "reduce_sum" and all(old[axis] == 1 or isinstance(axes[axis], int) for axis in params["axes"]):
        summed = value.summed or any(old[axis] != 1 for axis in params["axes"])
        return _Unit(value.place, tuple(n for axis, n in enumerate(axes) if axis not in params["axes"]), summed)
    return None


def _is_summed_by(name: str, values: Any) -> bool:
    """Whether the result of an operation is summed over sequences, as some of its operands may be."""
    summed = [i for i, value in enumerate(values) if isinstance(value, _Unit) and value.summed]
    if not summed:
        return False
    zero = [i for i, value in enumerate(values) if isinstance(value, _Known) and not np.any(value.array)]
    if len(summed) == 1 and summed[0] in _LINEAR.get(name, ()):
        return True
    if name in _SUMS and all(i in summed or i in zero for i in _SUMS[name]):
        return True
    raise Unread(f"{name!r} in their derivative acts on a gradient that is summed over sequences")


def _folded(eqn: Any, arrays: list[Any]) -> list[Any]:
    """The results of an operation on known arrays."""
    name, shapes = eqn.primitive.name, [(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
    if name.startswith("empty"):  # whatever it holds is never used
        return [np.broadcast_to(np.zeros((), dtype), shape) for shape, dtype in shapes]
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        raise Unread(_TRACED)
    if name == "broadcast_in_dim" and len(arrays) == 1 and isinstance(arrays[0], np.ndarray):
        inner = [1] * len(eqn.params["shape"])
        for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
            inner[to] = arrays[0].shape[axis]
        return [np.broadcast_to(arrays[0].reshape(inner), eqn.params["shape"])]
    # Of one number, once is enough, however large the batch is.
    uniform = name in ELEMENTWISE and all(isinstance(a, np.ndarray) and not _strides(a) for a in arrays)
    if uniform:
        arrays = [a[(0,) * a.ndim] for a in arrays]
    try:
        with jax.ensure_compile_time_eval():
            outs = eqn.primitive.bind(*arrays, **eqn.params)
    except Exception as error:
        raise Unread(f"{name!r} in them fails on constants ({type(error).__name__}: {error})") from error
    outs = outs if eqn.primitive.multiple_results else [outs]
    if uniform:
        return [np.broadcast_to(np.asarray(outs[0]), shapes[0][0])]
    return [out if jnp.issubdtype(out.dtype, jax.dtypes.extended) else np.asarray(out) for out in outs]


def _strides(array: np.ndarray[Any, Any]) -> list[int]:
    """The axes along which an array may vary: not those along which it was broadcast."""
    return [axis for axis, size in enumerate(array.shape) if size > 1 and array.strides[axis]]


def _concrete(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, jax.core.Tracer):
        raise Unread(_TRACED)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise Unread("they use a random key as a number")
    return np.asarray(array)


def _is_same_along(array: np.ndarray[Any, Any], axis: int) -> bool:
    """Whether all along an axis are the same number, bit by bit."""
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return bool(np.all(bits == np.take(bits, [0], axis)))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


# --- the gates at given shapes -----------------------------------------------------------------------------------


class Forms(NamedTuple):
    """What ``theta`` and the state are: the tree of both, the dtypes of its leaves, how many of these are theta's, the
    batch shape and H."""

    tree: Any
    dtypes: tuple[str, ...]
    thetas: int
    batch: tuple[Any, ...]
    hidden: int

    @classmethod
    def of(cls, theta: Any, state: Any) -> Forms:
        leaves, tree = jax.tree.flatten((theta, state))
        *batch, hidden = leaves[-1].shape
        return cls(tree, tuple(str(leaf.dtype) for leaf in leaves), len(jax.tree.leaves(theta)), tuple(batch), hidden)

    def arguments(self, parts: int, batch: tuple[Any, ...], turned: bool = False) -> tuple[Any, list[tuple[Any, ...]]]:
        """``((parts, theta, state), axes)`` for `Reader.read`; ``turned`` is units first, as in `layout.Units`."""
        vector: tuple[Any, Any] = ((self.hidden,), ("units",))
        full: tuple[Any, Any] = ((*batch, self.hidden), (*range(len(batch)), "units"))
        if turned:
            vector, full = ((self.hidden, 1), ("units", None)), ((self.hidden, *batch), ("units", *range(len(batch))))
        kinds = [vector if i < self.thetas else full for i in range(len(self.dtypes))]
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for (shape, _), dtype in zip(kinds, self.dtypes, strict=True)]
        part = (jax.ShapeDtypeStruct(full[0], self.dtypes[-1]),) * parts
        return (part, *self.tree.unflatten(leaves)), [full[1]] * parts + [axes for _, axes in kinds]

    def batches(self) -> list[tuple[int, ...]]:
        """Batch shapes to read gates at, at one of which at least no size is another's by accident."""
        if not all(isinstance(size, int) and size > 0 for size in self.batch):  # symbols, or no sequence
            return [(3,)]
        tells = max(self.batch, default=1) > 1 and self.hidden not in self.batch
        return [self.batch] if tells else [self.batch, (3,) if self.hidden != 3 else (4,)]


def program(
    reader: Reader, gates: Any, parts: int, forms: Forms, batch: tuple[int, ...], turned: bool = False
) -> tuple[int, ...]:
    """The places of the results of ``gates(parts, theta, state)`` and of its transpose, read at a batch shape.

    They are the new state and, from its gradient, those of parts, theta and state.
    """
    arguments, axes = forms.arguments(parts, batch, turned)
    states = len(forms.dtypes) - forms.thetas

    def both(parts: Any, theta: Any, state: Any, dnew: Any) -> Any:
        new, transpose = jax.vjp(gates, parts, theta, state)
        return new, transpose(dnew)

    return reader.read(both, (*arguments, arguments[-1]), [*axes, *axes[-states:]])


@functools.lru_cache(maxsize=256)
def _is_elementwise(cell: Any, forms: Forms) -> bool:
    count, reader = len(cell.sums), Reader()

    def gates(parts: Any, theta: Any, state: Any) -> Any:
        return cell.combine(theta, parts[:count], parts[count:], state, None)

    try:
        found = program(reader, gates, 2 * count, forms, forms.batches()[0])
    except Unread:
        return cell.elementwise is True and _turns(cell, forms)
    try:
        return program(reader, gates, 2 * count, forms, (3,), turned=True) == found
    except Unread:  # they name an axis
        return False


def _turns(cell: Any, forms: Forms) -> bool:
    """Whether the gates can be called with units first: not where they name an axis, or write out a shape."""
    gates = len(cell.sums)
    (parts, theta, state), _ = forms.arguments(2 * gates, (3,), turned=True)
    try:
        new = jax.eval_shape(lambda *a: cell.combine(a[1], a[0][:gates], a[0][gates:], a[2], None), parts, theta, state)
    except Exception:  # then they stay as they are, and the run itself says what is wrong, if anything is
        return False
    return same_form(new, state)


@functools.lru_cache(maxsize=256)
def _sums(cell: Any, forms: Forms) -> tuple[bool, ...]:
    gates = len(cell.sums)
    (parts, theta, state), _ = forms.arguments(2 * gates, forms.batches()[0])
    try:
        traced = jax.make_jaxpr(lambda *a: cell.combine(a[1], a[0][:gates], a[0][gates:], a[2], None))(
            parts, theta, state
        )
    except Exception:  # the run itself says what is wrong
        return tuple(cell.sums)
    us, vs = traced.jaxpr.invars[:gates], traced.jaxpr.invars[gates : 2 * gates]
    return tuple(_is_summed(traced.jaxpr, u, v) for u, v in zip(us, vs, strict=True))


def _is_summed(jaxpr: Any, u: Any, v: Any) -> bool:
    """Whether u and v are each used once, as the two terms of one sum."""
    users = [eqn for eqn in jaxpr.eqns if any(atom is u or atom is v for atom in eqn.invars)]
    if any(atom is u or atom is v for atom in jaxpr.outvars):
        return False
    if len(users) != 1 or users[0].primitive.name != "add":
        return False
    return all(any(atom is part for atom in users[0].invars) for part in (u, v))
