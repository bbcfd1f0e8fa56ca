"""Programs for one unit: gates that act on each unit separately, and their transpose.

Such gates apply the same program to every unit. A function that was traced on whole arrays is read as that program,
operation by operation. Gates that were read from a step (`jrnn.jaxprs.gates`) are such a program already. A size that a
function looks up becomes a number in its program. Programs that are read at several shapes are therefore equal only if
the function depends on no size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrnn.jaxprs.blocks import Elementwise
from jrnn.jaxprs.flat import Op, Program, Unreadable, apply_elementwise, bind, flatten
from jrnn.jaxprs.gates import Gates
from jrnn.jaxprs.primitives import primitive

__all__ = ["Operation", "PerUnit", "Unread"]

_TRACED = "they use a value that is being traced by JAX; make it one of the parameters beside the weights"


class Unread(Exception):
    """The reason why a function could not be read as one program for every unit."""


class Operation(NamedTuple):
    """An operation of a program for one unit. Its operands are indices into `PerUnit.operations`, called places.

    The names are those of JAX, and three others: ``argument`` with its number, ``constant`` with the bytes of a number
    that is the same for all units, and ``table`` with the bytes of one number for each unit.
    """

    name: str
    params: tuple[Any, ...]
    operands: tuple[int, ...]
    dtype: np.dtype[Any]


class _Unit(NamedTuple):
    """An array that the program computes.

    The name of an axis is "units", the number of a batch axis, or None if the array does not vary along it. If
    ``summed``, the array is a sum over sequences, as the gradients of vectors are, and the program computes its terms.
    """

    place: int
    axes: tuple[Any, ...]
    summed: bool = False


class _Known(NamedTuple):
    """An array that does not depend on the arguments."""

    array: Any


# An array that could not be read is represented by the reason, which is raised if a result depends on the array.
_Value = _Unit | _Known | Unread


class PerUnit:
    """Programs for one unit, all in one list of operations.

    Equal operations have the same place in the list. So two functions are the same program for every unit if, and only
    if, the places of their results are equal.
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
          Unread: the function is not the same program for every unit, or cannot be read as one.
        """
        try:
            traced = jax.make_jaxpr(function)(*arguments)
        except Exception as error:
            raise Unread(f"JAX cannot trace them, or their derivative ({type(error).__name__}: {error})") from error
        try:
            program, consts = flatten(traced, opened=True)
        except Unreadable as error:
            raise Unread(str(error)) from error
        inputs: list[_Value] = list(map(_Known, consts))
        forms: dict[tuple[int, ...], tuple[Any, ...]] = {}
        for i, (leaf, names) in enumerate(zip(jax.tree.leaves(arguments), axes, strict=True)):
            # Nothing varies along an axis of one element.
            names = tuple(None if size == 1 else name for name, size in zip(names, leaf.shape, strict=True))
            inputs.append(_Unit(self.argument(i, leaf.dtype), names))
            forms[leaf.shape] = names
        results = zip(self._run(program, inputs), program.results, strict=True)
        return tuple(self._result(value, program.form(result).shape, forms) for value, result in results)

    def argument(self, number: int, dtype: Any) -> int:
        return self._place("argument", (number,), (), dtype)

    def apply(self, made: Elementwise, operands: Sequence[int]) -> list[int]:
        """The places of the results of an elementwise operation on the operands at the given places."""
        op = made.op
        if primitive(op.name).same or op.name == "broadcast_in_dim":
            return [operands[0]]
        if op.inner is None:
            return [self._place(op.name, _static(op), tuple(operands), made.dtypes[0])]
        return self._splice(op.inner, operands)

    def _splice(self, program: Program, operands: Sequence[int]) -> list[int]:
        """The places of the results of an elementwise program, which may have been traced at any shapes."""
        values = self._run(program, [_Unit(place, ()) for place in operands])
        for value in values:
            if isinstance(value, Unread):
                raise value
        return [v.place if isinstance(v, _Unit) else self._constant(v.array, ()) for v in values]  # type: ignore[union-attr]

    def read_gates(self, gates: Gates, given: Mapping[str, Sequence[int]], dnew: Sequence[int]) -> Any:
        """``(leaves, cotangents)`` of gates: the places of the new leaves, and of the cotangent of each reference.

        Args:
          gates: the gates that were read from a step.
          given: the places of the gate inputs, by the kind of the reference; "sum" is ``u + v``.
          dnew: the places of the cotangents of the new leaves.

        Raises:
          Unread: the derivative of an operation is not known to be elementwise.
        """
        results: list[list[int]] = []

        def place(reference: Any) -> int:
            kind, at, *rest = reference
            if kind == "op":
                return results[at][rest[0]]
            if kind == "const":
                return self._place("constant", (at.value.tobytes(),), (), at.form.dtype)
            return given[kind][at]

        for made, operands in gates.ops:
            results.append(self.apply(made, [place(r) for r in operands]))
        leaves = tuple(map(place, gates.leaves))

        # The chain rule, from the last operation y = f(x) to the first: dx += (df/dx)^T dy, with JAX's own transposes.
        flowing: dict[Any, int] = {}

        def flow(reference: Any, cotangent: int) -> None:
            operation = self.operations[cotangent]
            if reference[0] == "const" or (operation.name == "constant" and not any(operation.params[0])):
                return
            if reference in flowing:
                cotangent = self._place("add_any", (), (flowing[reference], cotangent), operation.dtype)
            flowing[reference] = cotangent

        for reference, cotangent in zip(gates.leaves, dnew, strict=True):
            flow(reference, cotangent)
        for at in reversed(range(len(gates.ops))):
            made, operands = gates.ops[at]
            outs = [("op", at, which) for which in range(len(made.dtypes))]
            if not any(out in flowing for out in outs):
                continue
            cotangents = [
                flowing[out] if out in flowing else self.zero(dtype)
                for out, dtype in zip(outs, made.dtypes, strict=True)
                if _is_float(dtype)
            ]
            places = [place(r) for r in operands]
            dtypes = tuple(self.operations[p].dtype for p in places)
            moving = [r for r, dtype in zip(operands, dtypes, strict=True) if _is_float(dtype)]
            found = self._splice(_transpose(made, dtypes), [*places, *cotangents])
            for reference, cotangent in zip(moving, found, strict=True):
                flow(reference, cotangent)
        return leaves, flowing

    def zero(self, dtype: Any) -> int:
        return self._place("constant", (np.zeros((), dtype).tobytes(),), (), dtype)

    def live(self, results: tuple[int, ...]) -> list[int]:
        """The places of all operations that the results depend on, in an order in which they can run."""
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

    def _run(self, program: Program, inputs: Sequence[_Value]) -> list[_Value]:
        env: dict[int, _Value] = dict(enumerate(inputs))

        def value(atom: Any) -> _Value:
            return env[atom] if isinstance(atom, int) else _Known(np.asarray(atom.value, atom.form.dtype))

        for op in program.ops:
            if op.effects:  # raised even if no result depends on the operation
                raise Unread(f"{op.name!r} in them has a side effect")
            try:
                outs = self._outs(program, op, list(map(value, op.ins)))
            except Unread as reason:
                outs = [reason] * len(op.outs)
            env.update(zip(op.outs, outs, strict=True))
        return list(map(value, program.results))

    def _outs(self, program: Program, op: Op, values: list[_Value]) -> list[_Value]:
        name, row, forms = op.name, primitive(op.name), [program.forms[out] for out in op.outs]
        if row.same:
            return values
        if name == "cond" and isinstance(values[0], _Known):
            branch, consts = op.branches[min(max(int(_concrete(values[0].array)), 0), len(op.branches) - 1)]
            return self._run(branch, [*map(_Known, consts), *values[1:]])
        for reason in values:
            if isinstance(reason, Unread):
                raise reason
        known = [value.array for value in values if isinstance(value, _Known)]
        if len(known) == len(values):
            return [_Known(array) for array in _folded(op, known, forms)]
        unknown = f"{name!r} in them, or in their derivative, is not known to act on each unit by itself"
        if len(op.outs) != 1:
            raise Unread(unknown)
        if (moved := _moved(op, values[0], program.form(op.ins[0]).shape, forms[0].shape)) is not None:
            return [moved]
        if not row.elementwise:
            raise Unread(unknown)
        return [self._elementwise(op, values, forms[0])]

    def _elementwise(self, op: Op, values: Any, out: Any) -> _Unit:
        axes: list[Any] = [None] * len(out.shape)
        for value in values:
            if not isinstance(value, _Unit) or len(value.axes) != len(out.shape):
                continue
            for axis, name in enumerate(value.axes):
                if name is not None and axes[axis] not in (None, name):
                    raise Unread("they combine different axes of their arguments")
                axes[axis] = axes[axis] if name is None else name
        operands = tuple(self._constant(v.array, axes) if isinstance(v, _Known) else v.place for v in values)
        place = self._place(op.name, _static(op), operands, out.dtype)
        return _Unit(place, tuple(axes), _is_summed_by(op.name, values))

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

    def _result(self, value: _Value, shape: Any, forms: dict[tuple[int, ...], tuple[Any, ...]]) -> int:
        if (expected := forms.get(shape)) is None:
            raise Unread("they return arrays of another shape than the state's")
        if isinstance(value, Unread):
            raise value
        # A result without a batch axis is a gradient, which is summed over all sequences.
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


def _moved(op: Op, value: Any, old: tuple[int, ...], new: tuple[int, ...]) -> _Unit | None:
    """The result of an operation that only moves, adds or drops axes, or sums over sequences; else None."""
    if not isinstance(value, _Unit):
        return None
    name, params, axes = op.name, op.params, value.axes
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
    """Whether the result of an operation is a sum over sequences, given the operands that are."""
    summed = [i for i, value in enumerate(values) if isinstance(value, _Unit) and value.summed]
    if not summed:
        return False
    zero = [i for i, value in enumerate(values) if isinstance(value, _Known) and not np.any(value.array)]
    row = primitive(name)
    if len(summed) == 1 and summed[0] in row.linear:
        return True
    if row.sums and all(i in summed or i in zero for i in row.sums):
        return True
    raise Unread(f"{name!r} in their derivative acts on a gradient that is summed over sequences")


def _folded(op: Op, arrays: list[Any], forms: Any) -> list[Any]:
    """The results of an operation on known arrays."""
    name = op.name
    if name.startswith("empty"):  # its values are never used
        return [np.broadcast_to(np.zeros((), form.dtype), form.shape) for form in forms]
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        raise Unread(_TRACED)
    if name == "broadcast_in_dim" and len(arrays) == 1 and isinstance(arrays[0], np.ndarray):
        inner = [1] * len(op.params["shape"])
        for axis, to in enumerate(op.params["broadcast_dimensions"]):
            inner[to] = arrays[0].shape[axis]
        return [np.broadcast_to(arrays[0].reshape(inner), op.params["shape"])]
    # Arrays of one repeated number are computed on that number alone, whatever their size.
    uniform = primitive(name).elementwise and all(isinstance(a, np.ndarray) and not _strides(a) for a in arrays)
    if uniform:
        arrays = [a[(0,) * a.ndim] for a in arrays]
    try:
        with jax.ensure_compile_time_eval():
            outs = bind(op.primitive, op.params, arrays)
    except Exception as error:
        raise Unread(f"{name!r} in them fails on constants ({type(error).__name__}: {error})") from error
    if uniform:
        return [np.broadcast_to(np.asarray(outs[0]), forms[0].shape)]
    return [out if jnp.issubdtype(out.dtype, jax.dtypes.extended) else np.asarray(out) for out in outs]


def _strides(array: np.ndarray[Any, Any]) -> list[int]:
    """The axes along which an array may vary, without those along which it was broadcast."""
    return [axis for axis, size in enumerate(array.shape) if size > 1 and array.strides[axis]]


def _concrete(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, jax.core.Tracer):
        raise Unread(_TRACED)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise Unread("they use a random key as a number")
    return np.asarray(array)


def _is_same_along(array: np.ndarray[Any, Any], axis: int) -> bool:
    """Whether an array is constant along an axis, bit by bit."""
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return bool(np.all(bits == np.take(bits, [0], axis)))


def _static(op: Op) -> Any:
    return tuple((key, _hashable(value)) for key, value in sorted(op.params.items()))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _is_float(dtype: Any) -> bool:
    return bool(np.issubdtype(dtype, np.floating))


@functools.lru_cache(maxsize=1024)
def _transpose(made: Elementwise, dtypes: tuple[Any, ...]) -> Program:
    """The program ``(operands, cotangents) -> cotangents of the operands`` of one operation, for floats only.

    It is traced on scalars, once for each operation and not once for each step that contains the operation.
    """
    floats = [i for i, dtype in enumerate(dtypes) if _is_float(dtype)]

    def transposed(operands: Any, cotangents: Any) -> Any:
        def of(*moving: Any) -> Any:
            filled = list(operands)
            for i, value in zip(floats, moving, strict=True):
                filled[i] = value
            outs = apply_elementwise(made.op, filled)
            return [out for out, dtype in zip(outs, made.dtypes, strict=True) if _is_float(dtype)]

        return jax.vjp(of, *(operands[i] for i in floats))[1](cotangents)

    operands = [jax.ShapeDtypeStruct((), dtype) for dtype in dtypes]
    cotangents = [jax.ShapeDtypeStruct((), dtype) for dtype in made.dtypes if _is_float(dtype)]
    try:
        program, consts = flatten(jax.make_jaxpr(transposed)(operands, cotangents), opened=True)
    except Exception as error:
        raise Unread(f"JAX cannot transpose {made.op.name!r} in them ({type(error).__name__}: {error})") from error
    if consts:
        raise Unread(f"the derivative of {made.op.name!r} in them uses an array")
    return program
