"""A cell's gates, and their derivative, as C++ on vectors: what the kernel is compiled with.

Gates that act on each unit by itself are read as one program for every unit (`promises.Reader`), and each operation of
that program is one statement on a vector of units.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jrnn.schedules import promises
from jrnn.schedules.read import parts as count_parts
from jrnn.schedules.read import slots, unpack

__all__ = ["Unserved", "header"]


class Unserved(Exception):
    """Why gates cannot be written in C++."""


@functools.lru_cache(maxsize=256)
def header(cell: Any, forms: promises.Forms, sums: tuple[bool, ...]) -> str:
    """``cell.h`` for `cell.cc`: sizes, ``gates`` and ``gates_vjp``, and the constant arrays that these use.

    The gates are read at the shapes at hand, so what they make of H is right. They are called on other batch shapes
    too (a sequence at a time in C++, all batch axes as one in plain JAX), so they must make nothing of the batch shape.

    Args:
      cell: an affine cell.
      forms: what ``theta`` and the state are, all float32.
      sums: of each gate, whether it reads ``u + v``.

    Raises:
      Unserved: where the gates do not act on each unit by itself, or use an operation that is not known here.
    """
    if cell.elementwise is False:
        raise Unserved("its gates are not elementwise over H, as the cell declares")
    reader, states = promises.Reader(), len(forms.dtypes) - forms.thetas

    def gates(parts: Any, theta: Any, state: Any) -> Any:
        return cell.combine(theta, *unpack(sums, parts), state, None)

    read = functools.partial(promises.program, reader, gates, count_parts(sums), forms)
    try:
        both = read(())
        same = all(read(batch) == both for batch in forms.batches())
        # What runs without a derivative is written differently from it by some functions of JAX.
        forward, backward = reader.read(gates, *forms.arguments(count_parts(sums), ())), both[states:]
    except promises.Unread as error:
        raise Unserved(f"its gates cannot be read as elementwise over H: {error}") from error
    if not same:
        raise Unserved("its gates depend on the shape of the batch (on a size, or on the number of axes)")

    fields = list(forms.tree.unflatten(range(len(forms.dtypes)))[1]._fields)
    count, thetas = count_parts(sums), forms.thetas
    sizes = {"part": count, "theta": thetas, "old": states}
    arguments = [f"{name}[{i}]" for name, size in sizes.items() for i in range(size)]
    tables: dict[int, str] = {}
    functions = [
        *_function("gates", reader, forward, arguments, [f"now[{i}]" for i in range(states)], tables),
        *_function(
            "gates_vjp",
            reader,
            backward,
            [*arguments, *(f"dnew[{i}]" for i in range(states))],
            ["d" + place for place in arguments],
            tables,
        ),
    ]
    return "\n".join(
        [
            f"constexpr int GATES = {len(sums)}, SUMS = {sum(sums)}, PARTS = {count}, TABLES = {len(tables)};",
            f"constexpr int STATES = {states}, HIDDEN_STATE = {fields.index('h')}, THETAS = {thetas};",
            f"constexpr int SLOT[] = {{{', '.join(map(str, slots(sums)))}}};",
            *_tables(reader, tables, forms.hidden),
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
    name: str, reader: promises.Reader, results: tuple[int, ...], arguments: list[str], ends: list[str], tables: Any
) -> list[str]:
    """A program for one unit as a C++ function of vectors of units; adds the constant arrays that it uses to tables."""
    names: dict[int, str] = {}
    lines: list[str] = []
    for place in reader.live(results):
        operation = reader.operations[place]
        if operation.name == "argument":
            names[place] = arguments[operation.params[0]]
            continue
        kind = _KINDS.get(operation.dtype)
        if kind is None:
            raise Unserved(f"{operation.name!r} in its gates makes {operation.dtype}, which the kernel does not know")
        if operation.name == "constant":
            names[place] = _literal(operation)
            continue
        if operation.name == "table":
            text = tables.setdefault(place, f"table[{len(tables)}]")
            names[place] = text if kind == "vf" else f"({kind}){text}"
            continue
        operands = [reader.operations[i] for i in operation.operands]
        text = _expression(operation, [o.dtype for o in operands], [names[i] for i in operation.operands])
        names[place] = f"{_PREFIXES[operation.dtype]}{len(lines)}"
        lines.append(f"  const {kind} {names[place]} = {text};")
    for place in results:
        if reader.operations[place].dtype != np.float32:
            raise Unserved(f"its gates return {reader.operations[place].dtype}, not float32")
    stores = [f"  {end} = {names[place]};" for end, place in zip(ends, results, strict=True)]
    return [f"inline void {name}({_PARAMETERS[name]}) {{", *lines, *stores, "}"]


def _tables(reader: promises.Reader, tables: dict[int, str], hidden: int) -> list[str]:
    """The constant arrays, bit by bit, with zeros after the last unit; and a function that loads vectors of them."""
    lines = []
    for place, name in tables.items():
        operation = reader.operations[place]
        values = np.frombuffer(operation.params[0], operation.dtype)
        bits = -values.astype(np.int32) if operation.dtype == np.bool_ else values.view(np.int32)
        array = f"UNITS_{name[6:-1]}"
        lines.append(f"const int {array}[({hidden} + UB - 1) / UB * UB] = {{{', '.join(map(str, bits.tolist()))}}};")
    loads = [f"  __builtin_memcpy(table + {n}, UNITS_{n} + unit, sizeof(vf));" for n in range(len(tables))]
    return [*lines, "inline void load_tables(long unit, vf* table) {", *loads, "}"]


# A boolean is a mask: a vector of integers that are 0 or -1.
_FLOAT, _INT, _UINT, _BOOL = map(np.dtype, (np.float32, np.int32, np.uint32, np.bool_))
_KINDS = {_FLOAT: "vf", _INT: "vi", _UINT: "vu", _BOOL: "vi"}
_PREFIXES = {_FLOAT: "a", _INT: "i", _UINT: "u", _BOOL: "m"}

# Of vectors {0}, {1}, … of float32, of int32 or uint32, and of booleans.
_FLOATS = {
    "abs": "vabs({0})", "add": "{0} + {1}", "add_any": "{0} + {1}", "clamp": "vmin(vmax({1}, {0}), {2})",
    "div": "{0} / {1}", "exp": "vexp({0})", "is_finite": "vabs({0}) <= 3.4028235e38f", "logistic": "vlogistic({0})",
    "max": "vmax({0}, {1})", "min": "vmin({0}, {1})", "mul": "{0} * {1}", "neg": "-{0}",
    "one_minus_square": "1.0f - {0} * {0}", "rsqrt": "1.0f / vsqrt({0})", "sign": "vsign({0})", "sqrt": "vsqrt({0})",
    "square": "{0} * {0}", "sub": "{0} - {1}", "tanh": "vtanh({0})",
}  # fmt: skip
_INTS = {
    "add": "{0} + {1}", "and": "{0} & {1}", "clamp": "vmin(vmax({1}, {0}), {2})", "max": "vmax({0}, {1})",
    "min": "vmin({0}, {1})", "mul": "{0} * {1}", "neg": "-{0}", "not": "~{0}", "or": "{0} | {1}", "sub": "{0} - {1}",
    "xor": "{0} ^ {1}",
}  # fmt: skip
_MASKS = {
    "and": "{0} & {1}", "eq": "~({0} ^ {1})", "ne": "{0} ^ {1}", "not": "~{0}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
}  # fmt: skip
_OPERATIONS = {_FLOAT: _FLOATS, _INT: _INTS, _UINT: _INTS, _BOOL: _MASKS}
_COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!="}
# From one kind to another.
_CONVERSIONS = {
    (_FLOAT, _INT): "vint({0})", (_FLOAT, _BOOL): "{0} != 0.0f", (_INT, _FLOAT): "__builtin_convertvector({0}, vf)",
    (_INT, _BOOL): "{0} != 0", (_BOOL, _FLOAT): "{0} ? splat(1) : splat(0)", (_BOOL, _INT): "-{0}",
    (_INT, _UINT): "(vu){0}", (_UINT, _INT): "(vi){0}", (_UINT, _FLOAT): "__builtin_convertvector({0}, vf)",
    (_UINT, _BOOL): "{0} != 0", (_BOOL, _UINT): "(vu)-{0}",
}  # fmt: skip
# Lane by lane, by the C library (as builtins, which need no header): right, and not fast.
_LIBRARY = {
    "acos": "acosf", "acosh": "acoshf", "asin": "asinf", "asinh": "asinhf", "atan": "atanf", "atan2": "atan2f",
    "atanh": "atanhf", "cbrt": "cbrtf", "ceil": "ceilf", "cos": "cosf", "cosh": "coshf", "erf": "erff", "erfc": "erfcf",
    "exp2": "exp2f", "expm1": "expm1f", "floor": "floorf", "log": "logf", "log1p": "log1pf", "nextafter": "nextafterf",
    "pow": "powf", "rem": "fmodf", "sin": "sinf", "sinh": "sinhf", "tan": "tanf",
}  # fmt: skip


def _expression(operation: promises.Operation, dtypes: list[Any], values: list[str]) -> str:
    """The C++ of an operation on operands of the given dtypes."""
    name, params = operation.name, dict(operation.params)
    if name == "select_n" and len(values) == 3 and dtypes[0] != _FLOAT:
        which = values[0] if dtypes[0] == _BOOL else f"({values[0]} != 0)"
        return f"{which} ? {values[2]} : {values[1]}"
    if name == "convert_element_type":
        conversion = "{0}" if dtypes[0] == operation.dtype else _CONVERSIONS.get((dtypes[0], operation.dtype))
        if conversion is not None:
            return conversion.format(*values)
    if name == "bitcast_convert_type" and _BOOL not in (dtypes[0], operation.dtype):
        return f"({_KINDS[operation.dtype]})({values[0]})"
    if len(set(dtypes)) == 1:
        if name in _COMPARISONS and dtypes[0] != _BOOL:
            return f"{values[0]} {_COMPARISONS[name]} {values[1]}"
        if (text := _OPERATIONS[dtypes[0]].get(name)) is not None:
            return text.format(*values)
        if name == "integer_pow" and dtypes[0] == _FLOAT:
            return _power(values[0], params["y"])
        if name == "polynomial" and dtypes[0] == _FLOAT:
            return functools.reduce(lambda sum, factor: f"({sum}) * {values[0]} + {factor}", reversed(values[1:]))
        if name == "reduce_precision" and dtypes[0] == _FLOAT:
            return f"vreduce<{params['exponent_bits']}, {params['mantissa_bits']}>({values[0]})"
        if (function := _library(name, params)) is not None and dtypes[0] == _FLOAT:
            arguments = ("float a", "float b")[: len(values)]
            # XLA takes numbers too small to be normal as zero; the logarithm of the C library looks at their bits.
            given = "a == 0 ? 0.0f : a" if name == "log" else ", ".join("ab"[: len(values)])
            call = f"__builtin_{function}({given})"
            return f"each([]({', '.join(arguments)}) {{ return {call}; }}, {', '.join(values)})"
    raise Unserved(f"{name!r} of {' and '.join(sorted(set(map(str, dtypes))))} in its gates is not known to the kernel")


def _library(name: str, params: dict[str, Any]) -> str | None:
    """The function of the C library for an operation."""
    if name == "round":
        return "rintf" if params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN else "roundf"
    return _LIBRARY.get(name)


def _literal(operation: promises.Operation) -> str:
    value = np.frombuffer(operation.params[0], operation.dtype)[0]
    if operation.dtype == _BOOL:
        return f"(vi{{}} - {int(value)})"
    if operation.dtype == _INT:
        return f"(vi{{}} + ({int(value)}))"
    if operation.dtype == _UINT:
        return f"(vu{{}} + {int(value)}u)"
    if np.isnan(value):
        return 'splat(__builtin_nanf(""))'
    if np.isinf(value):
        return f"splat({'-' if value < 0 else ''}__builtin_inff())"
    return f"splat({float(value).hex()}f)"


def _power(x: str, exponent: int) -> str:
    """The product of the squares that XLA takes it from, so that it rounds as that does."""
    left, square, factors = abs(exponent), x, []
    while left:
        if left & 1:
            factors.append(square)
        square, left = f"vsquare({square})", left // 2
    product = " * ".join(factors) or "splat(1)"
    return product if exponent >= 0 else f"1.0f / ({product})"
