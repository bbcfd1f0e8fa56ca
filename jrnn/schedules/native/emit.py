"""Writes a cell's gates, and their derivative, as C++ on vectors, from which the cell's library is compiled.

Gates that act on each unit separately are one program for every unit (see `jrnn.jaxprs.per_unit`). Each operation of
that program becomes one statement on a vector of units.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jrnn.cells.form import ReadGates
from jrnn.jaxprs.gates import Gates
from jrnn.jaxprs.per_unit import Operation, PerUnit, Unread
from jrnn.jaxprs.primitives import primitive
from jrnn.jaxprs.primitives.in_cpp import BOOL, FLOAT, INT, KINDS, UINT
from jrnn.schedules import promises
from jrnn.schedules.read import parts as count_parts
from jrnn.schedules.read import slots, unpack

__all__ = ["Unserved", "header"]


class Unserved(Exception):
    """The reason why gates cannot be written in C++."""


def header(cell: Any, forms: promises.Forms, sums: tuple[bool, ...]) -> str:
    """``cell.h`` for `cell.cc`: sizes, ``gates`` and ``gates_vjp``, and the constant arrays that these use.

    Args:
      cell: an affine cell.
      forms: the structure, shapes and dtypes of ``theta`` and the state, all float32.
      sums: for each gate, whether it uses only ``u + v``.

    Raises:
      Unserved: the gates do not act on each unit separately, or use an operation that has no C++ in the table.
    """
    if isinstance(cell.combine, ReadGates):
        return _of_program(cell.combine.program, _field(forms), forms.thetas)
    return _of_function(cell, forms, sums)


@functools.lru_cache(maxsize=256)
def _of_program(gates: Gates, hidden: int, thetas: int) -> str:
    """The header for gates that were read from a step, which are a program for one unit already."""
    unit, sums, states = PerUnit(), gates.summed, len(gates.leaves)
    count = count_parts(sums)
    part, theta, old, dnew = _arguments(unit, (count, thetas, states, states))
    given = {
        "sum": part,
        "u": part,
        "v": [part[slot] for slot in slots(sums)],
        "theta": theta,
        "state": old,
    }
    try:
        forward, flowing = unit.read_gates(gates, given, dnew)
    except Unread as error:
        raise Unserved(f"its gates cannot be read as elementwise over H: {error}") from error
    zero = unit.zero(FLOAT)
    dpart = [flowing.get(("sum" if summed else "u", gate), zero) for gate, summed in enumerate(sums)]
    dpart += [flowing.get(("v", gate), zero) for gate, summed in enumerate(sums) if not summed]
    dtheta = [flowing.get(("theta", i), zero) for i in range(thetas)]
    dold = [flowing.get(("state", i), zero) for i in range(states)]
    return _header(unit, sums, (count, thetas, states), hidden, 0, forward, (*dpart, *dtheta, *dold))


def _field(forms: promises.Forms) -> int:
    """The index of h among the fields of the state."""
    return list(forms.tree.unflatten(range(len(forms.dtypes)))[1]._fields).index("h")


def _arguments(unit: PerUnit, sizes: tuple[int, ...]) -> list[list[int]]:
    numbers = iter(range(sum(sizes)))
    return [[unit.argument(next(numbers), FLOAT) for _ in range(size)] for size in sizes]


@functools.lru_cache(maxsize=256)
def _of_function(cell: Any, forms: promises.Forms, sums: tuple[bool, ...]) -> str:
    """The header for gates that are a function of whole arrays.

    The gates are read at the shapes of this run, so they may use H as a number. They also run at other batch shapes
    (one sequence at a time in C++, one merged batch axis in plain JAX), so they must not depend on the batch shape.
    """
    if cell.elementwise is False:
        raise Unserved("its gates are not elementwise over H, as the cell declares")
    unit, states, count = PerUnit(), len(forms.dtypes) - forms.thetas, count_parts(sums)

    def gates(parts: Any, theta: Any, state: Any) -> Any:
        return cell.combine(theta, *unpack(sums, parts), state, None)

    read = functools.partial(promises.program, unit, gates, count, forms)
    try:
        both = read(())
        same = all(read(batch) == both for batch in forms.batches())
        # The forward pass is read separately: some functions of JAX trace differently under differentiation.
        forward, backward = unit.read(gates, *forms.arguments(count, ())), both[states:]
    except Unread as error:
        raise Unserved(f"its gates cannot be read as elementwise over H: {error}") from error
    if not same:
        raise Unserved("its gates depend on the shape of the batch (on a size, or on the number of axes)")
    sizes = (count, forms.thetas, states)
    return _header(unit, sums, sizes, _field(forms), forms.hidden, forward, backward)


def _header(
    unit: PerUnit,
    sums: tuple[bool, ...],
    sizes: tuple[int, int, int],
    field: int,
    hidden: int,
    forward: tuple[int, ...],
    backward: tuple[int, ...],
) -> str:
    """The text, from the places of the new state, and of the cotangents of parts, theta and state.

    ``sizes`` are the numbers of parts, of vectors of theta and of fields of the state; ``field`` is the index of h.
    """
    count, thetas, states = sizes
    arguments = [
        f"{name}[{i}]" for name, size in zip(("part", "theta", "old"), sizes, strict=True) for i in range(size)
    ]
    cotangents = [f"dnew[{i}]" for i in range(states)]
    tables: dict[int, str] = {}
    functions = [
        *_function("gates", unit, forward, arguments, [f"now[{i}]" for i in range(states)], tables),
        *_function(
            "gates_vjp", unit, backward, [*arguments, *cotangents], ["d" + place for place in arguments], tables
        ),
    ]
    return "\n".join(
        [
            f"constexpr int GATES = {len(sums)}, SUMS = {sum(sums)}, PARTS = {count}, TABLES = {len(tables)};",
            f"constexpr int STATES = {states}, HIDDEN_STATE = {field}, THETAS = {thetas};",
            f"constexpr int SLOT[] = {{{', '.join(map(str, slots(sums)))}}};",
            *_tables(unit, tables, hidden),
            *functions,
            "",
        ]
    )


_PARAMETERS = {
    "gates": "const vf* theta, const vf* part, const vf* old, const vf* table, vf* now",
    "gates_vjp": "const vf* theta, const vf* part, const vf* old, const vf* dnew, const vf* table, vf* dtheta, "
    "vf* dpart, vf* dold",
}


def _function(
    name: str, unit: PerUnit, results: tuple[int, ...], arguments: list[str], ends: list[str], tables: Any
) -> list[str]:
    """A program for one unit as a C++ function of vectors of units. Adds its constant arrays to ``tables``."""
    names: dict[int, str] = {}
    lines: list[str] = []
    for place in unit.live(results):
        operation = unit.operations[place]
        if operation.name == "argument":
            names[place] = arguments[operation.params[0]]
            continue
        kind = KINDS.get(operation.dtype)
        if kind is None:
            raise Unserved(f"{operation.name!r} in its gates makes {operation.dtype}, which the kernel does not know")
        if operation.name == "constant":
            names[place] = _literal(operation)
            continue
        if operation.name == "table":
            text = tables.setdefault(place, f"table[{len(tables)}]")
            names[place] = text if kind == "vf" else f"({kind}){text}"
            continue
        operands = [unit.operations[i] for i in operation.operands]
        text = _expression(operation, [o.dtype for o in operands], [names[i] for i in operation.operands])
        names[place] = f"{_PREFIXES[operation.dtype]}{len(lines)}"
        lines.append(f"  const {kind} {names[place]} = {text};")
    for place in results:
        if unit.operations[place].dtype != np.float32:
            raise Unserved(f"its gates return {unit.operations[place].dtype}, not float32")
    stores = [f"  {end} = {names[place]};" for end, place in zip(ends, results, strict=True)]
    return [f"inline void {name}({_PARAMETERS[name]}) {{", *lines, *stores, "}"]


def _tables(unit: PerUnit, tables: dict[int, str], hidden: int) -> list[str]:
    """The bits of the constant arrays, padded with zeros to whole blocks; and a function that loads vectors of them."""
    lines = []
    for place, name in tables.items():
        operation = unit.operations[place]
        values = np.frombuffer(operation.params[0], operation.dtype)
        bits = -values.astype(np.int32) if operation.dtype == np.bool_ else values.view(np.int32)
        array = f"UNITS_{name[6:-1]}"
        lines.append(f"const int {array}[({hidden} + UB - 1) / UB * UB] = {{{', '.join(map(str, bits.tolist()))}}};")
    loads = [f"  __builtin_memcpy(table + {n}, UNITS_{n} + unit, sizeof(vf));" for n in range(len(tables))]
    return [*lines, "inline void load_tables(long unit, vf* table) {", *loads, "}"]


_PREFIXES = {FLOAT: "a", INT: "i", UINT: "u", BOOL: "m"}


def _expression(operation: Operation, dtypes: list[Any], values: list[str]) -> str:
    """The C++ of an operation on operands of the given dtypes."""
    row, params = primitive(operation.name), dict(operation.params)
    if row.kinds is not None and (text := row.kinds(params, dtypes, operation.dtype, *values)) is not None:
        return text
    if len(set(dtypes)) == 1:
        known = {FLOAT: row.floats, INT: row.ints, UINT: row.ints, BOOL: row.masks}[dtypes[0]]
        if known is not None:
            return known.format(*values) if isinstance(known, str) else known(params, *values)
    kinds = " and ".join(sorted(set(map(str, dtypes))))
    raise Unserved(f"{operation.name!r} of {kinds} in its gates is not known to the kernel")


def _literal(operation: Operation) -> str:
    value = np.frombuffer(operation.params[0], operation.dtype)[0]
    if operation.dtype == BOOL:
        return f"(vi{{}} - {int(value)})"
    if operation.dtype == INT:
        return f"(vi{{}} + ({int(value)}))"
    if operation.dtype == UINT:
        return f"(vu{{}} + {int(value)}u)"
    if np.isnan(value):
        return 'splat(__builtin_nanf(""))'
    if np.isinf(value):
        return f"splat({'-' if value < 0 else ''}__builtin_inff())"
    return f"splat({float(value).hex()}f)"
