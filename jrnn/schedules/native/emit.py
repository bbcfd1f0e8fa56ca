"""A cell's gates, and their derivative, as C++ on vectors: what the kernel is compiled with.

Elementwise gates do the same to every unit, so they are traced on scalars, and each operation of the traced program is
one statement on a vector of units.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jrnn.schedules import promises
from jrnn.schedules.read import parts as count_parts
from jrnn.schedules.read import slots, unpack

__all__ = ["Unserved", "header"]


class Unserved(Exception):
    """Why gates cannot be written in C++."""


@functools.lru_cache(maxsize=256)
def header(cell: Any, theta_tree: Any, state_tree: Any, sums: tuple[bool, ...]) -> str:
    """``cell.h`` for `cell.cc`: sizes, ``gates`` and ``gates_vjp``.

    Args:
      cell: an affine cell whose gates are elementwise.
      theta_tree, state_tree: tree structures of ``theta`` and of the state, all float32.
      sums: of each gate, whether it reads ``u + v``.

    Raises:
      Unserved: where an operation is not known here.
    """
    places = slots(sums)
    theta, state = (
        jax.tree.unflatten(tree, [jax.ShapeDtypeStruct((), jnp.float32)] * tree.num_leaves)
        for tree in (theta_tree, state_tree)
    )
    parts = (jax.ShapeDtypeStruct((), jnp.float32),) * count_parts(sums)

    def gates(theta: Any, parts: Any, state: Any) -> Any:
        return cell.combine(theta, *unpack(sums, parts), state, None)

    def vjp(theta: Any, parts: Any, state: Any, dnew: Any) -> Any:
        return jax.vjp(gates, theta, parts, state)[1](dnew)

    named: Any = {"theta": theta, "part": parts, "old": state}
    fields = list(jax.tree.unflatten(state_tree, range(state_tree.num_leaves))._fields)
    lines = [
        f"constexpr int GATES = {len(sums)}, SUMS = {sum(sums)}, PARTS = {len(parts)};",
        f"constexpr int STATES = {len(fields)}, HIDDEN_STATE = {fields.index('h')}, THETAS = {theta_tree.num_leaves};",
        f"constexpr int SLOT[] = {{{', '.join(map(str, places))}}};",
        *_function("gates", gates, named, ("now",)),
        *_function("gates_vjp", vjp, {**named, "dnew": state}, ("dtheta", "dpart", "dold")),
    ]
    return "\n".join([*lines, ""])


def _function(name: str, function: Any, arguments: dict[str, Any], results: tuple[str, ...]) -> list[str]:
    """A traced function of named trees of scalars as a C++ function of arrays of vectors."""
    try:
        closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments.values())
    except Exception as error:
        raise Unserved(f"its gates cannot be traced unit by unit ({type(error).__name__}: {error})") from error
    if any(leaf.shape for leaf in jax.tree.leaves(out)):
        raise Unserved("its gates give one unit a shape")
    jaxpr = closed.jaxpr
    writer = _Writer()
    names = iter(_places(arguments))
    for var in jaxpr.invars:
        writer.names[var] = next(names)
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        if np.shape(value):
            raise Unserved("its gates use an array of their own; put it into theta")
        writer.names[var] = _literal(value)
    writer.run(jaxpr)
    trees = (out,) if len(results) == 1 else out
    ends = zip(_places(dict(zip(results, trees, strict=True))), jaxpr.outvars, strict=True)
    parameters = [*(f"const vf* {a}" for a in arguments), *(f"vf* {r}" for r in results)]
    return [
        f"inline void {name}({', '.join(parameters)}) {{",
        *writer.lines,
        *(f"  {place} = {writer.value(var)};" for place, var in ends),
        "}",
    ]


def _places(trees: dict[str, Any]) -> list[str]:
    return [f"{name}[{i}]" for name, tree in trees.items() for i in range(len(jax.tree.leaves(tree)))]


# Of vectors {0}, {1}, … of float32; comparisons give masks, vectors of int32 that are 0 or -1.
_FLOATS = {
    "abs": "vabs({0})", "add": "{0} + {1}", "add_any": "{0} + {1}", "div": "{0} / {1}", "exp": "vexp({0})",
    "logistic": "vlogistic({0})", "max": "vmax({0}, {1})", "min": "vmin({0}, {1})", "mul": "{0} * {1}",
    "neg": "-{0}", "one_minus_square": "1.0f - {0} * {0}", "rsqrt": "1.0f / vsqrt({0})",
    "sign": "vsign({0})", "sqrt": "vsqrt({0})", "square": "{0} * {0}", "sub": "{0} - {1}", "tanh": "vtanh({0})",
}  # fmt: skip
_COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_SAME = ("copy", "copy_p", "stop_gradient", "optimization_barrier", "reduce_precision")
# Lane by lane, by the C library (as builtins, which need no header): right, and not fast.
_LIBRARY = {
    "acos": "acosf", "asin": "asinf", "atan": "atanf", "atan2": "atan2f", "cbrt": "cbrtf", "ceil": "ceilf",
    "cos": "cosf", "cosh": "coshf", "erf": "erff", "erfc": "erfcf", "exp2": "exp2f", "expm1": "expm1f",
    "floor": "floorf", "log": "logf", "log1p": "log1pf", "nextafter": "nextafterf", "pow": "powf", "rem": "fmodf",
    "sin": "sinf", "sinh": "sinhf", "tan": "tanf",
}  # fmt: skip


class _Writer:
    """Writes a traced program of scalars as statements on vectors."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []
        self.count = 0

    def run(self, jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if any(var.aval.shape for var in eqn.outvars):
                raise Unserved(f"{name!r} in its gates gives one unit a shape")
            if (program := promises.called(eqn)) is not None:
                self.call(eqn, *program)
                continue
            out = eqn.outvars[0]
            is_mask = out.aval.dtype == jnp.bool_
            if not is_mask and out.aval.dtype != jnp.float32:
                raise Unserved(f"{name!r} in its gates makes {out.aval.dtype}, not float32")
            self.count += 1
            result = f"{'m' if is_mask else 'a'}{self.count}"
            self.lines.append(f"  const {'vi' if is_mask else 'vf'} {result} = {self.expression(name, eqn)};")
            self.names[out] = result

    def call(self, eqn: Any, jaxpr: Any, consts: Any) -> None:
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            self.names[var] = _literal(value)
        # Arguments that the called program does not take (residuals of its derivative) come first.
        for var, atom in zip(jaxpr.invars, eqn.invars[len(eqn.invars) - len(jaxpr.invars) :], strict=True):
            self.names[var] = self.value(atom)
        self.run(jaxpr)
        for var, atom in zip(eqn.outvars, jaxpr.outvars, strict=True):
            self.names[var] = self.value(atom)

    def expression(self, name: str, eqn: Any) -> str:
        params, atoms = eqn.params, eqn.invars
        masks = [atom.aval.dtype == jnp.bool_ for atom in atoms]
        values = [self.value(atom) for atom in atoms]
        if name in _SAME or name == "broadcast_in_dim":
            return self.value(atoms[0])
        if name in _LOGIC and all(masks):
            return f"{values[0]} {_LOGIC[name]} {values[1]}"
        if name == "not" and masks[0]:
            return f"~{values[0]}"
        if name == "select_n" and len(atoms) == 3 and masks[0]:
            return f"{values[0]} ? {self.value(atoms[2])} : {self.value(atoms[1])}"
        if name == "convert_element_type":
            if params["new_dtype"] == jnp.bool_:
                return f"{values[0]} != 0.0f" if not masks[0] else values[0]
            return f"{values[0]} ? splat(1) : splat(0)" if masks[0] else self.value(atoms[0])
        if any(masks):
            raise Unserved(f"{name!r} of booleans in its gates is not known to the kernel")
        if any(atom.aval.dtype != jnp.float32 for atom in atoms):
            raise Unserved(f"{name!r} of {atoms[0].aval.dtype} in its gates is not known to the kernel")
        if name in _FLOATS:
            return _FLOATS[name].format(*values)
        if name in _COMPARISONS:
            return f"{values[0]} {_COMPARISONS[name]} {values[1]}"
        if name == "clamp":
            return f"vmin(vmax({values[1]}, {values[0]}), {values[2]})"
        if name == "integer_pow":
            return _power(values[0], params["y"])
        if name == "is_finite":
            return f"vabs({values[0]}) <= 3.4028235e38f"
        if name in _LIBRARY:
            arguments = ("float a", "float b")[: len(values)]
            call = f"__builtin_{_LIBRARY[name]}({', '.join('ab'[: len(values)])})"
            return f"each([]({', '.join(arguments)}) {{ return {call}; }}, {', '.join(values)})"
        raise Unserved(f"{name!r} in its gates is not known to the kernel")

    def value(self, atom: Any) -> str:
        if isinstance(atom, jax.extend.core.Literal):
            return _literal(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
        return self.names[atom]


def _literal(value: Any) -> str:
    value = np.asarray(value)
    if value.dtype == np.bool_:
        return f"(vi{{}} - {int(value)})"
    if value.dtype != np.float32 and value.dtype.kind == "f":
        raise Unserved(f"its gates use a constant of {value.dtype}, not float32")
    if np.isnan(value):
        return 'splat(__builtin_nanf(""))'
    if np.isinf(value):
        return f"splat({'-' if value < 0 else ''}__builtin_inff())"
    return f"splat({float(value).hex()}f)"


def _power(x: str, exponent: int) -> str:
    if exponent == 0:
        return "splat(1)"
    factors = "(" + " * ".join([x] * abs(exponent)) + ")"
    return factors if exponent > 0 else f"1.0f / {factors}"
